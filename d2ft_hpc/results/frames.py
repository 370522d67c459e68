"""Tables as pandas and xarray have them. Both are optional and imported where they are used."""

from typing import TYPE_CHECKING, Any

import numpy as np

from d2ft_hpc.errors import ResultsError
from d2ft_hpc.results.schema import ROW_AXES, TABLES, Table

if TYPE_CHECKING:
    import pandas
    import xarray


def to_pandas(columns: Table, table: str, *, by_rank: bool) -> "pandas.DataFrame":
    """The single numbers and texts, one row for each row; or the per-rank columns, one row for each row and rank."""
    import pandas

    axes = ("rank",) if by_rank else ()
    chosen = {name: columns[name] for name, field in TABLES[table].items() if field.axes == axes}
    row_axis = ROW_AXES[table]
    if not by_rank:
        frame = pandas.DataFrame(chosen)
        return frame.set_index(row_axis) if row_axis in chosen else frame.rename_axis(row_axis)
    if not chosen:
        raise ResultsError(f"{table} has no per-rank columns: only steps has")
    ranks = next(iter(chosen.values())).shape[1]
    pairs = pandas.MultiIndex.from_product([columns["step"], range(ranks)], names=[row_axis, "rank"])
    return pandas.DataFrame({name: column.ravel() for name, column in chosen.items()}, index=pairs)


def to_xarray(columns: Table, table: str) -> "xarray.Dataset":
    """All columns with their axes, units and descriptions; the index along each axis is a coordinate."""
    import xarray

    variables: dict[str, Any] = {}
    for name, field in TABLES[table].items():
        axes = (ROW_AXES[table], *field.axes)
        variables[name] = (axes, columns[name], {"units": field.units, "long_name": field.description})
    sizes = {
        axis: size
        for axes, column, _ in variables.values()
        for axis, size in zip(axes, column.shape, strict=True)
    }
    for axis, size in sizes.items():
        if axis not in variables:
            variables[axis] = ((axis,), np.arange(size), {"units": "1", "long_name": f"index along {axis}"})
    dataset: xarray.Dataset = xarray.Dataset(variables).set_coords(list(sizes))
    return dataset
