"""HiGHS behind one function: a linear program or a mixed-integer one, and only answers that can be trusted."""

from __future__ import annotations

import math
from dataclasses import dataclass

import highspy
import numpy as np

from d2ft_hpc.planning.problem import Floats, Ints

OPTIMAL = "optimal"

LARGEST_MODEL = 10_000
"""Variables of the largest mixed-integer model that HiGHS is given. In larger ones it looks at its clock too
rarely to be stopped in time; models up to this size overshoot their time by fractions of a second."""

_FEASIBLE = 2  # HiGHS: kSolutionStatusFeasible
_ROW_WISE, _MAXIMISE = 2, -1  # HiGHS: MatrixFormat, ObjSense


@dataclass(frozen=True, eq=False)
class Rows:
    """Constraints lower <= sum of value[i] * variable[column[i]] over the entries i of a row <= upper.

    row, column: int64 [entry]. value: float64 [entry]. lower, upper: float64 [row].
    """

    row: Ints
    column: Ints
    value: Floats
    lower: Floats
    upper: Floats


@dataclass(frozen=True, eq=False)
class Solution:
    """values: float64 [variable], None if there are none that satisfy the rows. duals: float64 [row], of linear
    programs that were solved to the end, else None. bound: no solution has a larger objective; inf = not known.
    status: OPTIMAL or why not."""

    values: Floats | None
    duals: Floats | None
    bound: float
    status: str


def maximise(
    gain: Floats, rows: Rows, *, integer: bool, seconds: float, absolute_gap: float = 0.0, relative_gap: float = 0.0
) -> Solution:
    """Maximise gain @ variables over variables in [0, 1], whole numbers if `integer`.

    seconds: wall-clock limit. absolute_gap, relative_gap: an integer solution this near its bound is optimal.
    """
    if integer and len(gain) > LARGEST_MODEL:
        return Solution(None, None, math.inf, f"{len(gain)} variables are more than HiGHS is given ({LARGEST_MODEL})")
    if seconds <= 0:
        return Solution(None, None, math.inf, "time limit")
    solver = highspy.Highs()  # type: ignore[no-untyped-call]
    options = {
        "log_to_console": False,  # before output_flag, which would announce the change
        "output_flag": False,
        "threads": 1,  # another number could not be changed later in this process, and breaks forks
        "time_limit": seconds,
        "mip_abs_gap": absolute_gap,
        "mip_rel_gap": relative_gap,
        "mip_feasibility_tolerance": 1e-9,  # of the order of BUDGET_EPSILON
        "primal_feasibility_tolerance": 1e-9,
        "dual_feasibility_tolerance": 1e-9,
    }
    for name, value in options.items():
        solver.setOptionValue(name, value)
    order = np.argsort(rows.row, kind="stable")
    lengths = np.bincount(rows.row, minlength=len(rows.lower))
    passed = solver.passModel(
        len(gain),
        len(rows.lower),
        len(order),
        _ROW_WISE,
        _MAXIMISE,
        0.0,
        np.asarray(gain, dtype=np.float64),
        np.zeros(len(gain)),
        np.ones(len(gain)),
        rows.lower,
        rows.upper,
        np.concatenate([[0], np.cumsum(lengths)[:-1]]).astype(np.int32),
        rows.column[order].astype(np.int32),
        rows.value[order].astype(np.float64),
        np.full(len(gain), int(integer), dtype=np.int32),
    )
    if passed == highspy.HighsStatus.kError:
        return Solution(None, None, math.inf, "HiGHS refused the model")
    if solver.run() == highspy.HighsStatus.kError:
        return Solution(None, None, math.inf, "HiGHS failed")

    info, ending = solver.getInfo(), solver.getModelStatus()
    if ending == highspy.HighsModelStatus.kOptimal:
        status = OPTIMAL
    elif ending == highspy.HighsModelStatus.kTimeLimit:
        status = "time limit"
    else:
        status = f"HiGHS ended with {solver.modelStatusToString(ending)}"
    if integer:
        bound = float(info.mip_dual_bound)
    else:
        bound = float(info.objective_function_value) if status == OPTIMAL else math.inf
    solution = solver.getSolution()
    feasible = int(info.primal_solution_status) == _FEASIBLE
    return Solution(
        values=np.asarray(solution.col_value) if feasible else None,
        duals=np.asarray(solution.row_dual) if status == OPTIMAL and not integer else None,
        bound=bound if math.isfinite(bound) else math.inf,
        status=status,
    )
