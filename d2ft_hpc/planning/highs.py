"""Solves linear and mixed-integer programs by HiGHS, and returns only answers that can be trusted."""

from __future__ import annotations

import math
from dataclasses import dataclass

import highspy
import numpy as np

from d2ft_hpc.planning.arrays import Flags, Floats, Ints

OPTIMAL = "optimal"
_ENDINGS = {
    highspy.HighsModelStatus.kOptimal: OPTIMAL,
    highspy.HighsModelStatus.kTimeLimit: "time limit",
    highspy.HighsModelStatus.kInfeasible: "infeasible",
}

LARGEST_MODEL = 10_000
"""Integer variables of the largest model that HiGHS is given. In larger ones it looks at its clock too
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


class LinearProgram:
    """Maximise gain @ variables over variables in [0, 1], with more variables joining between solutions.

    Each solution starts from the one before, so that a few new variables cost little.
    """

    def __init__(self, lower: Floats, upper: Floats) -> None:
        """lower, upper: float64 [row], of the sums that the variables make."""
        self._solver = _new_solver()
        self._solver.setOptionValue("presolve", "off")  # costs more than it saves in programs of this size
        self._solver.changeObjectiveSense(highspy.ObjSense.kMaximize)
        nothing = np.zeros(0, dtype=np.int32)
        starts = np.zeros(len(lower), dtype=np.int32)
        self._solver.addRows(len(lower), lower, upper, 0, starts, nothing, np.zeros(0))

    def add(self, gain: Floats, column: Ints, row: Ints, value: Floats) -> None:
        """New variables with their gains float64 [variable] and entries [entry], whose column counts them from 0."""
        order = np.argsort(column, kind="stable")
        lengths = np.bincount(column, minlength=len(gain))
        self._solver.addCols(
            len(gain),
            gain,
            np.zeros(len(gain)),
            np.ones(len(gain)),
            len(order),
            (np.cumsum(lengths) - lengths).astype(np.int32),
            row[order].astype(np.int32),
            value[order],
        )

    def solve(self, seconds: float) -> Solution:
        """seconds: wall-clock limit."""
        if seconds <= 0:
            return Solution(None, None, math.inf, "time limit")
        self._solver.setOptionValue("time_limit", self._solver.getRunTime() + seconds)
        if self._solver.run() == highspy.HighsStatus.kError:
            return Solution(None, None, math.inf, "HiGHS failed")
        return _solution(self._solver, is_integer=False)


def reason_against(integers: int, seconds: float) -> str:
    """Why HiGHS is not given a model with this many integer variables and this much time; empty if it may have it."""
    if integers > LARGEST_MODEL:
        return f"{integers} integer variables are more than HiGHS is given ({LARGEST_MODEL})"
    return "time limit" if seconds <= 0 else ""


def maximise_integer(
    gain: Floats,
    rows: Rows,
    *,
    seconds: float,
    largest: Floats | None = None,
    is_integer: Flags | None = None,
    absolute_gap: float = 0.0,
    relative_gap: float = 0.0,
) -> Solution:
    """Maximise gain @ variables over variables from 0 to `largest` (1 if not given), whole where `is_integer`
    says so (everywhere if not given).

    seconds: wall-clock limit. absolute_gap, relative_gap: a solution this near its bound is optimal.
    """
    if len(gain) == 0:
        return Solution(np.zeros(0), None, 0.0, OPTIMAL)
    if reason := reason_against(len(gain) if is_integer is None else int(is_integer.sum()), seconds):
        return Solution(None, None, math.inf, reason)
    solver = _new_solver()
    solver.setOptionValue("time_limit", seconds)
    solver.setOptionValue("mip_abs_gap", absolute_gap)
    solver.setOptionValue("mip_rel_gap", relative_gap)
    order = np.argsort(rows.row, kind="stable")
    lengths = np.bincount(rows.row, minlength=len(rows.lower))
    passed = solver.passModel(
        len(gain),
        len(rows.lower),
        len(order),
        _ROW_WISE,
        _MAXIMISE,
        0.0,
        gain,
        np.zeros(len(gain)),
        np.ones(len(gain)) if largest is None else largest,
        rows.lower,
        rows.upper,
        (np.cumsum(lengths) - lengths).astype(np.int32),
        rows.column[order].astype(np.int32),
        rows.value[order],
        np.ones(len(gain), dtype=np.int32) if is_integer is None else is_integer.astype(np.int32),
    )
    if passed == highspy.HighsStatus.kError:
        return Solution(None, None, math.inf, "HiGHS refused the model")
    if solver.run() == highspy.HighsStatus.kError:
        return Solution(None, None, math.inf, "HiGHS failed")
    return _solution(solver, is_integer=True)


class _QuietHighs(highspy.Highs):
    """HiGHS writes its banner in the first call that sets no option, which is one in highspy's own constructor."""

    def enableCallbacks(self) -> None:  # noqa: N802
        self.setOptionValue("output_flag", False)
        super().enableCallbacks()  # type: ignore[no-untyped-call]


def _new_solver() -> highspy.Highs:
    solver = _QuietHighs()  # type: ignore[no-untyped-call]
    options = {
        "output_flag": False,
        "threads": 1,  # another number could not be changed later in this process, and breaks forks
        "mip_feasibility_tolerance": 1e-9,  # of the order of BUDGET_EPSILON
        "primal_feasibility_tolerance": 1e-9,
        "dual_feasibility_tolerance": 1e-9,
    }
    for name, value in options.items():
        solver.setOptionValue(name, value)
    return solver


def _solution(solver: highspy.Highs, *, is_integer: bool) -> Solution:
    info, ending = solver.getInfo(), solver.getModelStatus()
    status = _ENDINGS.get(ending) or f"HiGHS ended with {solver.modelStatusToString(ending)}"
    if is_integer:
        bound = float(info.mip_dual_bound)
    else:
        bound = float(info.objective_function_value) if status == OPTIMAL else math.inf
    solution = solver.getSolution()
    is_feasible = int(info.primal_solution_status) == _FEASIBLE
    return Solution(
        values=np.asarray(solution.col_value) if is_feasible else None,
        duals=np.asarray(solution.row_dual) if status == OPTIMAL and not is_integer else None,
        bound=bound if math.isfinite(bound) else math.inf,
        status=status,
    )
