"""Files of schema version 1, whose plans and scores were numbered groups instead of tables."""

import re
from typing import Any

import h5py

from d2ft_hpc.results import columns
from d2ft_hpc.results.schema import TABLES, Array, Table
from d2ft_hpc.results.untrusted import child, read_attributes, read_dataset, read_table, refuse

_MEMBER_NAME = re.compile(r"\d{1,9}")


def read_version1_table(file: Any, name: str) -> Table:
    """A table of a version 1 file as version 2 has it."""
    if name not in ("plans", "scores"):
        return read_table(file, name)
    group = child(file, name)
    if group is None:
        return {}
    if not isinstance(group, h5py.Group):
        raise refuse(f"{name} is not a group")
    members = list(group)
    for member in members:
        if not _MEMBER_NAME.fullmatch(member):
            raise refuse(f"{name} has a member {member!r}")
    return columns.stack(name, [_record(child(group, member), name) for member in sorted(members, key=int)])


def _record(group: Any, table: str) -> dict[str, Array | str]:
    attributes = read_attributes(group)
    if "first_step" in attributes:
        attributes["step"] = attributes.pop("first_step")
    record: dict[str, Any] = {"step": -1}
    for field in TABLES[table].values():
        dataset = child(group, field.name)
        if dataset is not None:
            record[field.name] = read_dataset(dataset, field)
        elif field.name in attributes:
            record[field.name] = attributes[field.name]
    return record
