"""Files of schema version 1, whose plans and scores were numbered groups instead of tables."""

import re
from typing import Any

import h5py
import numpy as np

from d2ft_hpc.files.hdf5 import Allowance, child, read_attributes
from d2ft_hpc.files.untrusted import RefusedError
from d2ft_hpc.results import columns
from d2ft_hpc.results.schema import TABLES, Array, Table
from d2ft_hpc.results.untrusted import read_dataset, read_table

_MEMBER_NAME = re.compile(r"\d{1,9}")


def read_version1_table(file: Any, name: str, allowance: Allowance) -> Table:
    """A table of a version 1 file as version 2 has it."""
    if name not in ("plans", "scores"):
        return read_table(file, name, None, allowance)
    group = child(file, name)
    if group is None:
        return {}
    if not isinstance(group, h5py.Group):
        raise RefusedError(f"{name} is not a group")
    members = list(group)
    for member in members:
        if not _MEMBER_NAME.fullmatch(member):
            raise RefusedError(f"{name} has a member {member!r}")
    records = [_record(child(group, member), name, allowance) for member in sorted(members, key=int)]
    return columns.stack(name, records, allowance)


def _record(group: Any, table: str, allowance: Allowance) -> dict[str, Array | str]:
    attributes = read_attributes(group)
    if "first_step" in attributes:
        attributes["step"] = attributes.pop("first_step")
    record: dict[str, Any] = {"step": -1}
    for field in TABLES[table].values():
        dataset = child(group, field.name)
        if dataset is not None:
            record[field.name] = read_dataset(dataset, field, allowance)
            if np.ndim(record[field.name]) != len(field.axes):
                raise RefusedError(f"{dataset.name} has a wrong number of dimensions")
        elif field.name in attributes:
            record[field.name] = attributes[field.name]
    return record
