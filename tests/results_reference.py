"""The results' schema as Markdown: `python -m tests.results_reference > d2ft_hpc/results/README.md` writes it anew."""

from __future__ import annotations

from d2ft_hpc.results import schema
from d2ft_hpc.results.schema import GROUPS, ROW_AXES, TABLES

_READING = """\
# The results file

    from d2ft_hpc import results
    with results.open("runs/demo") as run:     # executes nothing and follows nothing that the file names
        run.table("steps")["step_seconds"]     # NumPy, [step, rank]
        run.pandas("evaluations")              # needs pip install 'd2ft-hpc[analysis]'
        run.xarray("plans")

In plain h5py: `h5py.File("results.h5")["steps/step_seconds"][:]`. In xarray, without this package:
`xarray.open_dataset("results.h5", group="steps", engine="h5netcdf")`. Tests read files in these ways. By hand
(`tests/manual/read_results.sh`) they were read with h5wasm, which is h5web's library, and with h5dump of HDF5 1.10,
finished and killed; MATLAB was not tried.

The file can be opened at any moment, also after the run was killed. While a run goes on, the file links closed segments
that lie beside it; a thread adds one every five seconds, which is the most that a kill loses. At the end it
becomes one file that needs no other. A resumed run continues it. Ranks send their figures to rank 0 without waiting for
anybody. With `results.file_per_rank=true`, for thousands of ranks, each rank keeps its figures in `results.ranks/`, and
`results.h5` joins them as virtual datasets. HDF5 needs no file locks for any of this; a lock on
`results.segments/lock`, where the file system has locks, keeps two jobs from writing the same run.

The rest of this page is made from [schema.py](schema.py) by `python -m tests.results_reference`.
"""


def document() -> str:
    """The schema as Markdown."""
    lines = [*_READING.splitlines(), "", "## Structure", "", *(schema.__doc__ or "").strip().splitlines()]
    for table, fields in TABLES.items():
        lines += ["", f"## Table `{table}`", "", *_document_fields(fields, ROW_AXES[table])]
    for group, fields in GROUPS.items():
        if fields:
            lines += ["", f"## Group `{group}`", "", *_document_fields(fields, None)]
    return "\n".join(lines) + "\n"


def _document_fields(fields: dict[str, schema.Field], row_axis: str | None) -> list[str]:
    lines = ["| dataset | axes | type | unit | what |", "|---|---|---|---|---|"]
    for field in fields.values():
        axes = ", ".join(filter(None, (row_axis, *field.axes)))
        lines.append(f"| `{field.name}` | {axes} | {field.kind} | {field.units} | {field.description} |")
    return lines


if __name__ == "__main__":
    print(document(), end="")
