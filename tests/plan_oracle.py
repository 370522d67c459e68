"""What plans are measured against: small instances of every kind, and their optima by other means than the planners'.

Nothing here comes from a planner: uses are counted cell by cell, the best heads of a rank are found by trying all
3^heads, and what is chosen over the whole batch by a mixed-integer program of its own or by trying everything.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from d2ft_hpc.errors import PlanError
from d2ft_hpc.planning import PlanProblem

EPSILON = 1e-9
SMALLEST = 3e-7  # of a mean score: less is no difference; HiGHS answers within 1e-7 for each stage

FACTORS: dict[str, tuple[Any, ...]] = {
    "shape": (  # slots, blocks, heads
        (1, 2, 6),
        (2, 2, 6),
        (3, 1, 6),
        (2, 3, 4),
        (3, 2, 4),
        (4, 2, 2),
        (1, 3, 6),
    ),
    "replicas": (1, 2),
    "ranks": (1, 2, 3),
    "stages": (1, 2),
    "speeds": ((1.0,), (1.0, 0.5, 0.7, 0.9), (1.0, 1.001)),
    "replicas_meet": (False, True),
    "messages": ("by_head", "by_meeting", "both"),
    "token_layout": ("replicated", "sharded", "overlapped"),
    "compute_budget": (1.0, 0.8, 0.55, 0.3),
    "communication_budget": (None, 0.7, 0.45),
    "memory_budget": (None, 0.75, 0.4),
    "unlike_budgets": (False, True),
    "forward_cost": (1 / 3, 0.3517, 0.5, 0.0, 1.0),
    "shortcut_cost": (0.0, 0.0, 0.05),
    "always_share": (0.0, 0.1),
    "scores": ("different", "different", "whole", "equal", "no_backward", "no_forward"),
    "owner": ("even", "even", "even", "uneven"),
    "most_shortcut": (1.0, 1.0, 0.5, 0.0),
}
"""What instances differ in. A value that stands here twice is drawn twice as often."""

FIELDS: dict[str, set[str]] = {
    "forward_score": {"scores", "shape"},
    "backward_score": {"scores", "shape"},
    "replicas": {"replicas"},
    "rank": {"ranks", "owner"},
    "stage": {"stages"},
    "device_speed": {"speeds"},
    "compute_cost": {"forward_cost", "shortcut_cost"},
    "communication_cost": {"messages", "shortcut_cost"},
    "compute_budget": {"compute_budget", "unlike_budgets"},
    "communication_budget": {"communication_budget", "unlike_budgets"},
    "memory_budget": {"memory_budget", "unlike_budgets"},
    "always_share": {"always_share"},
    "meeting_cost": {"messages"},
    "replicas_meet": {"replicas_meet"},
    "token_layout": {"token_layout"},
}
"""The factors that decide each field of a `PlanProblem`."""


@dataclass(frozen=True)
class Instance:
    """A problem, and the planners' options that belong to it."""

    problem: PlanProblem
    most_shortcut: float
    drawn: dict[str, Any]


def draw(seed: int, **fixed: Any) -> Instance:
    """The instance of a seed, with some factors fixed if wanted."""
    generator = np.random.default_rng(seed)
    drawn = {name: values[generator.integers(len(values))] for name, values in FACTORS.items()} | fixed
    slots, blocks, heads = drawn["shape"]
    replicas, stages = drawn["replicas"], min(drawn["stages"], blocks)
    ranks = drawn["ranks"] if heads % drawn["ranks"] == 0 else 2
    shape = (slots * replicas, blocks, heads)
    scores = generator.lognormal(0, 1, (2, *shape))
    if drawn["scores"] == "whole":
        scores = generator.integers(0, 3, (2, *shape)).astype(float)
    elif drawn["scores"] == "equal":
        scores = np.ones((2, *shape))
    elif drawn["scores"] == "no_backward":
        scores[1] = 0.0
        scores[1].flat[0] = 1.0  # all zero counts as all equal
    elif drawn["scores"] == "no_forward":
        scores[0] = 0.0
        scores[0].flat[0] = 1.0
    rank = np.stack([generator.permutation(np.arange(heads) % ranks) for _ in range(blocks)])
    if drawn["owner"] == "uneven":
        rank = generator.integers(0, ranks, (blocks, heads))
        rank[0, :ranks] = np.arange(ranks)
    stage = np.arange(blocks) * stages // blocks
    devices = replicas * stages * ranks
    base = drawn["shortcut_cost"]
    cells = np.zeros(devices)
    for replica, block, head in np.ndindex(replicas, blocks, heads):
        cells[(replica * stages + stage[block]) * ranks + rank[block, head]] += slots
    by_head, meeting = {
        "by_head": ((base, base + 0.5, base + 1.0), (0.0, 0.0)),
        "by_meeting": ((0.0, 0.0, 0.0), (0.5, 0.5)),
        "both": ((0.0, 0.1, 0.3), (0.4, 0.6)),
    }[drawn["messages"]]
    unlike = generator.uniform(0.7, 1.0, (3, devices)) if drawn["unlike_budgets"] else np.ones((3, devices))
    speed = np.resize(drawn["speeds"], devices)
    compute = (base, base + drawn["forward_cost"], base + 1.0)
    share = drawn["compute_budget"]
    share = (max(share - drawn["always_share"], 0.05)) / (1 - drawn["always_share"])
    if drawn["compute_budget"] == 1.0:
        compute_budget = (
            np.full(devices, math.inf) if not drawn["unlike_budgets"] else cells * compute[2] * unlike[0]
        )
    else:
        compute_budget = cells * (base + np.minimum(share * speed / speed.mean() * unlike[0], 1.0))
    dense = cells * by_head[2]
    for device in range(devices):
        dense[device] += slots * (stage == device // ranks % stages).sum() * sum(meeting)
    communication_budget = np.full(devices, math.inf)
    if drawn["communication_budget"] is not None:
        least = cells * by_head[0]
        communication_budget = least + (dense - least) * drawn["communication_budget"] * unlike[1]
    memory_budget = np.full(devices, math.inf)
    if drawn["memory_budget"] is not None:
        memory_budget = np.floor(drawn["memory_budget"] * cells / slots * unlike[2] + EPSILON)
    problem = PlanProblem(
        forward_score=scores[0],
        backward_score=scores[1],
        replicas=replicas,
        rank=rank,
        stage=stage,
        device_speed=speed,
        compute_cost=compute,
        communication_cost=by_head,
        compute_budget=compute_budget,
        communication_budget=communication_budget,
        memory_budget=memory_budget,
        always_share=drawn["always_share"],
        meeting_cost=meeting,
        replicas_meet=drawn["replicas_meet"],
        token_layout=drawn["token_layout"],
    )
    return Instance(problem, drawn["most_shortcut"], drawn)


def gains(instance: Instance) -> tuple[np.ndarray, np.ndarray]:
    """What running forward gives, and running backward on top: mean-normalised scores."""
    return tuple(  # type: ignore[return-value]
        score / score.mean() if score.any() else np.ones_like(score)
        for score in (instance.problem.forward_score, instance.problem.backward_score)
    )


def score(instance: Instance, operations: np.ndarray) -> float:
    forward, backward = gains(instance)
    return float((forward * (operations >= 1)).sum() + (backward * (operations == 2)).sum())


def share_sent(layout: str, ranks: int, active: int, senders: int) -> float:
    """As a share of what the ranks of a block send if all of them run: they send for each branch, and a block that
    one rank runs counts as one branch."""
    share = senders / ranks
    if ranks > 1 and layout == "replicated":
        share = (0.0, 0.5, *[1.0] * ranks)[senders]
    return share / 2 if active == 1 and ranks > 1 else share


def uses(problem: PlanProblem, operations: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Compute, communication and the most FULL cells of a row, of every device, counted cell by cell."""
    rows, blocks, heads = operations.shape
    compute, sent, memory = np.zeros((3, problem.num_devices))
    for row in range(rows):
        full = np.zeros(problem.num_devices)
        for block in range(blocks):
            first = (row % problem.replicas * problem.stages + problem.stage[block]) * problem.ranks
            of_rank: list[list[int]] = [[] for _ in range(problem.ranks)]
            for head in range(heads):
                operation = int(operations[row, block, head])
                of_rank[problem.rank[block, head]].append(operation)
                device = first + problem.rank[block, head]
                compute[device] += problem.compute_cost[operation]
                sent[device] += problem.communication_cost[operation]
                full[device] += operation == 2
            active, training = (sum(max(own, default=0) >= least for own in of_rank) for least in (1, 2))
            for cost, senders in zip(problem.meeting_cost, (active, training), strict=True):
                sent[first : first + problem.ranks] += cost * share_sent(
                    problem.token_layout, problem.ranks, active, senders
                )
        memory = np.maximum(memory, full)
    return compute, sent, memory


def keeps_budgets(problem: PlanProblem, operations: np.ndarray) -> bool:
    budgets = (problem.compute_budget, problem.communication_budget, problem.memory_budget)
    return all(
        (used <= budget + 1e-8 * max(1.0, problem.forward_score.size)).all()
        for used, budget in zip(uses(problem, operations), budgets, strict=True)
    )


def keeps_demands(instance: Instance, operations: np.ndarray) -> bool:
    """Whether most_shortcut holds."""
    problem = instance.problem
    enough = True
    for rank in range(problem.ranks):
        mine = problem.rank == rank
        idle, held = ((operations == 0) & mine).sum(axis=2), mine.sum(axis=1)
        enough &= bool((idle <= np.floor(instance.most_shortcut * held + EPSILON)).all())
    return bool(enough)


class _Program:
    """Maximise gain @ variables over whole (or not) variables under rows that join one by one."""

    def __init__(self) -> None:
        self.gain: list[float] = []
        self.most: list[float] = []
        self.whole: list[bool] = []
        self.rows: list[tuple[dict[int, float], float, float]] = []

    def variable(self, gain: float = 0.0, most: float = 1.0, whole: bool = True) -> int:
        self.gain.append(gain)
        self.most.append(most)
        self.whole.append(whole)
        return len(self.gain) - 1

    def row(self, entries: dict[int, float], least: float, most: float) -> None:
        if math.isfinite(least) or math.isfinite(most):
            self.rows.append((entries, least, most))

    def solve(self) -> tuple[float, float, np.ndarray] | None:
        """The optimum from below and above, and the variables; None if there is no solution."""
        matrix = np.zeros((len(self.rows), len(self.gain)))
        for index, (entries, _, _) in enumerate(self.rows):
            for variable, value in entries.items():
                matrix[index, variable] += value
        result = milp(
            -np.array(self.gain),
            integrality=np.array(self.whole, dtype=int),
            bounds=Bounds(0, np.array(self.most)),
            constraints=LinearConstraint(matrix, [r[1] for r in self.rows], [r[2] for r in self.rows])
            if self.rows
            else None,
            options={"mip_rel_gap": 0.0, "time_limit": 20.0},
        )
        if result.status == 2:
            return None
        assert result.x is not None, result.message
        bound = -result.mip_dual_bound if result.mip_dual_bound is not None else -result.fun
        variables = np.where(self.whole, np.rint(result.x), result.x)
        value = float(np.array(self.gain) @ variables)
        return value, max(value, float(bound)), variables


def best_of_all(instance: Instance) -> tuple[float, float, np.ndarray] | None:
    """The optimum over all plans that keep budgets and demands, meetings not counted (so it is a bound where these are
    limited); None if there is no such plan."""
    problem, program = instance.problem, _Program()
    forward, backward = gains(instance)
    runs, full = np.zeros((2, *forward.shape), dtype=int)
    for cell in np.ndindex(*forward.shape):
        runs[cell], full[cell] = program.variable(forward[cell]), program.variable(backward[cell])
        program.row({full[cell]: 1.0, runs[cell]: -1.0}, -math.inf, 0.0)
    for device in range(problem.num_devices):
        mine = [tuple(cell) for cell in np.argwhere(_device(problem) == device)]
        for costs, budget in (
            (problem.compute_cost, problem.compute_budget[device]),
            (problem.communication_cost, problem.communication_budget[device]),
        ):
            entries = {int(runs[cell]): costs[1] - costs[0] for cell in mine}
            entries |= {int(full[cell]): costs[2] - costs[1] for cell in mine}
            program.row(entries, -math.inf, budget - len(mine) * costs[0] + EPSILON)
        for row in range(forward.shape[0]):
            of_row = {int(full[cell]): 1.0 for cell in mine if cell[0] == row}
            program.row(of_row, -math.inf, problem.memory_budget[device])
            for block in range(forward.shape[1]):
                here = [cell for cell in mine if cell[:2] == (row, block)]
                least = len(here) - math.floor(instance.most_shortcut * len(here) + EPSILON)
                program.row({int(runs[cell]): 1.0 for cell in here}, least, math.inf)
    solved = program.solve()
    if solved is None:
        return None
    value, bound, variables = solved
    operations = (np.rint(variables[runs]) + np.rint(variables[full])).astype(np.uint8)
    return value, bound, operations


def _device(problem: PlanProblem) -> np.ndarray:
    replica = np.arange(problem.forward_score.shape[0]) % problem.replicas
    team = replica[:, None] * problem.stages + problem.stage
    return team[:, :, None] * problem.ranks + problem.rank


@dataclass(frozen=True)
class Way:
    """One way for the ranks that meet in a block of a row to run together: of each member the heads that run forward
    and of these the FULL ones, the times of the slowest, and the best score."""

    counts: tuple[tuple[int, int], ...]
    forward_time: float
    backward_time: float
    value: float


def teams(problem: PlanProblem) -> list[list[int]]:
    """Replicas that are planned together."""
    replicas = list(range(problem.replicas))
    return [replicas] if problem.replicas_meet else [[replica] for replica in replicas]


def members(problem: PlanProblem, replicas: list[int], stage: int) -> list[tuple[int, int, int]]:
    """(replica, rank, device) of those that meet in the blocks of a stage."""
    return [
        (replica, rank, (replica * problem.stages + stage) * problem.ranks + rank)
        for replica in replicas
        for rank in range(problem.ranks)
    ]


def times(
    problem: PlanProblem, devices: list[int], heads: int, part: int
) -> list[tuple[float, tuple[int, ...]]]:
    """Times at which some member is done with a whole number of heads, and how many each member is done with."""
    cost = problem.compute_cost[part + 1] - problem.compute_cost[part]
    if cost == 0:
        return [(0.0, (count,) * len(devices)) for count in range(heads + 1)]
    ends = sorted(
        {count * cost / problem.device_speed[device] for device in devices for count in range(heads + 1)}
    )
    done: dict[tuple[int, ...], float] = {}
    for end in ends:
        counts = tuple(min(heads, math.floor(end * problem.device_speed[d] / cost + 1e-7)) for d in devices)
        done.setdefault(counts, end)
    return [(end, counts) for counts, end in done.items()]


def ways(instance: Instance, replicas: list[int], slot: int, block: int, idle_ranks: bool) -> list[Way]:
    """All ways in lock step. idle_ranks: some of the ranks may run nothing, or nothing backward."""
    problem, (forward, backward) = instance.problem, gains(instance)
    stage = int(problem.stage[block])
    team = members(problem, replicas, stage)
    heads = problem.forward_score.shape[2] // problem.ranks
    best: list[dict[tuple[int, int], float]] = []
    for replica, rank, _ in team:
        row, its_heads = slot * problem.replicas + replica, np.flatnonzero(problem.rank[block] == rank)
        table: dict[tuple[int, int], float] = {}
        for operations in itertools.product((0, 1, 2), repeat=len(its_heads)):
            chosen = np.array(operations)
            key = (int((chosen >= 1).sum()), int((chosen == 2).sum()))
            value = (forward[row, block, its_heads] * (chosen >= 1)).sum()
            value += (backward[row, block, its_heads] * (chosen == 2)).sum()
            table[key] = max(table.get(key, -math.inf), float(value))
        best.append(table)
    least = heads - math.floor(instance.most_shortcut * heads + EPSILON)
    devices = [device for _, _, device in team]
    found: dict[tuple[tuple[int, int], ...], Way] = {}
    for forward_time, runs in times(problem, devices, heads, 0):
        for backward_time, trains in times(problem, devices, heads, 1):
            both = [(run, min(run, train)) for run, train in zip(runs, trains, strict=True)]
            choices = [{one} | ({(0, 0), (one[0], 0)} if idle_ranks else set()) for one in both]
            for counts in itertools.product(*choices):
                if min(run for run, _ in counts) < least:
                    continue
                value = sum(table[count] for table, count in zip(best, counts, strict=True))
                known = found.get(counts)
                if known is None or forward_time + backward_time < known.forward_time + known.backward_time:
                    found[counts] = Way(counts, forward_time, backward_time, value)
    return list(found.values())


def _counted(way: Way, member: int, idle_ranks: bool) -> tuple[int, int]:
    """The heads of a member that its budgets must pay for: where ranks may be idle, as if it never were."""
    return max(run for run, _ in way.counts) if idle_ranks else way.counts[member][0], (
        max(train for _, train in way.counts) if idle_ranks else way.counts[member][1]
    )


def sent_by(problem: PlanProblem, way: Way, member: int, idle_ranks: bool = False) -> float:
    """What a member sends above SHORTCUT everywhere."""
    first = member - member % problem.ranks
    own = way.counts[first : first + problem.ranks]
    active, training = (sum(count[kind] > 0 for count in own) for kind in (0, 1))
    shortcut, forward, full = problem.communication_cost
    run, train = _counted(way, member, idle_ranks)
    meetings = sum(
        cost * share_sent(problem.token_layout, problem.ranks, active, senders)
        for cost, senders in zip(problem.meeting_cost, (active, training), strict=True)
    )
    return (forward - shortcut) * run + (full - forward) * train + meetings


def time_budget(problem: PlanProblem, devices: list[int]) -> float:
    """When the first of the devices that may not run densely has used up its compute budget."""
    cells = np.bincount(_device(problem).ravel(), minlength=problem.num_devices)
    least = math.inf
    for device in devices:
        if problem.compute_budget[device] < cells[device] * problem.compute_cost[2] * (1 - EPSILON):
            left = problem.compute_budget[device] - cells[device] * problem.compute_cost[0]
            least = min(least, left / problem.device_speed[device])
    return least


def holds_alike(problem: PlanProblem) -> bool:
    """Whether all ranks hold equally many heads in all blocks, as lock step needs."""
    counts = [(problem.rank == rank).sum(axis=1) for rank in range(problem.ranks)]
    return bool(np.ptp(counts) == 0)


def has_idle_ranks(instance: Instance, replicas: list[int], stage: int) -> bool:
    """Whether plans for the clock may leave ranks idle: where their meetings are limited."""
    problem = instance.problem
    devices = [device for _, _, device in members(problem, replicas, stage)]
    return (
        any(problem.meeting_cost)
        and bool(np.isfinite(problem.communication_budget[devices]).all())
        and len(set(problem.device_speed[devices])) == 1
        and len(replicas) == 1
    )


def best_in_lock_step(instance: Instance) -> tuple[float, float] | None:
    """The optimum of `makespan`'s plans, from below and above; None if there is no such plan."""
    totals = np.zeros(2)
    for replicas in teams(instance.problem):
        solved = _best_of_replicas(instance, replicas)
        if solved is None:
            return None
        totals += solved
    return float(totals[0]), float(totals[1])


def _best_of_replicas(instance: Instance, replicas: list[int]) -> tuple[float, float] | None:
    problem, program = instance.problem, _Program()
    slots = problem.forward_score.shape[0] // problem.replicas
    group_time, row_limits = math.inf, []
    for stage in range(problem.stages):
        team = members(problem, replicas, stage)
        devices = [device for _, _, device in team]
        idle = has_idle_ranks(instance, replicas, stage)
        chosen: list[tuple[int, int, Way]] = []
        for slot in range(slots):
            in_row = []
            for block in np.flatnonzero(problem.stage == stage):
                options = ways(instance, replicas, slot, int(block), idle)
                variables = [program.variable(way.value) for way in options]
                program.row(dict.fromkeys(variables, 1.0), 1.0, 1.0)
                in_row += list(zip(variables, options, strict=True))
            chosen += [(slot, variable, way) for variable, way in in_row]
            row_limits.append(in_row)
            for member, device in enumerate(devices):
                full = {variable: float(_counted(way, member, idle)[1]) for variable, way in in_row}
                program.row(full, -math.inf, problem.memory_budget[device])
        cells = np.bincount(_device(problem).ravel(), minlength=problem.num_devices)
        for member, device in enumerate(devices):
            most = problem.communication_budget[device] - cells[device] * problem.communication_cost[0]
            sent = {variable: sent_by(problem, way, member, idle) for _, variable, way in chosen}
            program.row(sent, -math.inf, most + EPSILON * 10)
        its_budget = time_budget(problem, devices)
        if problem.stages == 1:
            spent = {variable: way.forward_time + way.backward_time for _, variable, way in chosen}
            program.row(spent, -math.inf, its_budget + EPSILON * 10)
        group_time = min(group_time, its_budget / slots)
    if problem.stages > 1 and math.isfinite(group_time):
        _split(instance, replicas, program, group_time, row_limits)
    solved = program.solve()
    return None if solved is None else solved[:2]


def _split(
    instance: Instance,
    replicas: list[int],
    program: _Program,
    group_time: float,
    rows: list[list[tuple[int, Way]]],
) -> None:
    """Every stage's forwards of a row get one time, its backwards another, of `group_time` in all. Where ranks differ
    in speed, the backwards' is a whole number of heads on the slowest rank of the stage with most blocks, up to the
    dense backwards of all stages."""
    problem = instance.problem
    blocks = [int((problem.stage == stage).sum()) for stage in range(problem.stages)]
    cost, heads = (
        problem.compute_cost[2] - problem.compute_cost[1],
        problem.forward_score.shape[2] / problem.ranks,
    )
    slowest = [
        min(problem.device_speed[device] for _, _, device in members(problem, replicas, stage))
        for stage in range(problem.stages)
    ]
    head = cost / slowest[int(np.argmax(blocks))]
    dense = max(count * heads * cost / speed for count, speed in zip(blocks, slowest, strict=True))
    count = program.variable(
        most=math.ceil(dense / head - EPSILON) if head else 0,
        whole=len(set(problem.device_speed)) > 1,
    )
    for in_row in rows:
        backward = {variable: way.backward_time for variable, way in in_row}
        program.row(backward | {count: -head}, -math.inf, EPSILON * 10)
        forward = {variable: way.forward_time for variable, way in in_row}
        program.row(forward | {count: head}, -math.inf, group_time + EPSILON * 10)


def is_in_lock_step(instance: Instance, operations: np.ndarray) -> bool:
    """Whether a plan is of `makespan`'s kind and done in time."""
    problem = instance.problem
    slots = problem.forward_score.shape[0] // problem.replicas
    for replicas in teams(problem):
        parts = np.zeros((problem.stages, slots, 2))
        budget = math.inf
        for stage in range(problem.stages):
            team = members(problem, replicas, stage)
            idle = has_idle_ranks(instance, replicas, stage)
            its_budget = time_budget(problem, [device for _, _, device in team])
            budget = min(budget, its_budget)
            for slot in range(slots):
                for block in np.flatnonzero(problem.stage == stage):
                    counts = []
                    for replica, rank, _ in team:
                        mine = operations[slot * problem.replicas + replica, block][
                            problem.rank[block] == rank
                        ]
                        counts.append((int((mine >= 1).sum()), int((mine == 2).sum())))
                    its_ways = ways(instance, replicas, slot, int(block), idle)
                    same = [way for way in its_ways if way.counts == tuple(counts)]
                    if not same:
                        return False
                    parts[stage, slot] += same[0].forward_time, same[0].backward_time
        spent = parts.sum() if problem.stages == 1 else parts.max(axis=(0, 1)).sum() * slots
        if spent > budget + 1e-7:
            return False
    return True


def best_static(instance: Instance) -> float | None:
    """The optimum of `static`'s plans by trying all; None if there is none."""
    problem = instance.problem
    total = 0.0
    slots = problem.forward_score.shape[0] // problem.replicas
    for replicas in teams(problem):
        tables = []
        for stage in range(problem.stages):
            blocks = [int(block) for block in np.flatnonzero(problem.stage == stage)]
            by_class = {
                (slot, block): {way.counts: way for way in ways(instance, replicas, slot, block, False)}
                for slot in range(slots)
                for block in blocks
            }
            tables.append((stage, blocks, by_class))
        levels = [frozenset(next(iter(by_class.values()))) for _, _, by_class in tables]
        alike = [tables] if len(set(levels)) == 1 else [[table] for table in tables]
        for group in alike:
            best = -math.inf
            for pair in _pairs(next(iter(group[0][2].values()))):
                value = 0.0
                for stage, blocks, by_class in group:
                    its_best = -math.inf
                    for levels_of_blocks in itertools.product(pair, repeat=len(blocks)):
                        chosen = {
                            (slot, block): by_class[slot, block][level]
                            for slot in range(slots)
                            for block, level in zip(blocks, levels_of_blocks, strict=True)
                        }
                        if _fits(instance, replicas, stage, chosen):
                            its_best = max(its_best, sum(way.value for way in chosen.values()))
                    value += its_best
                best = max(best, value)
            total += best
    return total if math.isfinite(total) else None


def _pairs(levels: dict[tuple[tuple[int, int], ...], Way]) -> set[tuple[Any, Any]]:
    """A level with itself, and with the ones that run or train the next larger number of heads in all."""
    sums = {counts: (sum(r for r, _ in counts), sum(t for _, t in counts)) for counts in levels}
    runs, trains = (sorted({pair[kind] for pair in sums.values()}) for kind in (0, 1))
    place = {counts: (runs.index(r), trains.index(t)) for counts, (r, t) in sums.items()}
    return {
        (lower, upper)
        for lower in levels
        for upper in levels
        if all(0 <= place[upper][kind] - place[lower][kind] <= 1 for kind in (0, 1))
    }


def _fits(instance: Instance, replicas: list[int], stage: int, chosen: dict[tuple[int, int], Way]) -> bool:
    problem = instance.problem
    devices = [device for _, _, device in members(problem, replicas, stage)]
    cells = np.bincount(_device(problem).ravel(), minlength=problem.num_devices)
    spent = sum(way.forward_time + way.backward_time for way in chosen.values())
    if spent > time_budget(problem, devices) + 1e-8:
        return False
    for member, device in enumerate(devices):
        sent = sum(sent_by(problem, way, member) for way in chosen.values())
        most = problem.communication_budget[device] - cells[device] * problem.communication_cost[0]
        if sent > most + 1e-8:
            return False
        for slot in {slot for slot, _ in chosen}:
            full = sum(way.counts[member][1] for (its, _), way in chosen.items() if its == slot)
            if full > problem.memory_budget[device]:
                return False
    return True


def best_by_depth(instance: Instance) -> float | None:
    """The optimum of `depth`'s plans by trying all; None if there is none."""
    problem = instance.problem
    rows, blocks, heads = problem.forward_score.shape
    depths = range(blocks + 1)
    slots = rows // problem.replicas
    total = 0.0
    for replica in range(problem.replicas):
        best = -math.inf
        alone = dataclasses.replace(
            instance,
            problem=dataclasses.replace(
                problem,
                compute_budget=_only(problem, replica, problem.compute_budget),
                communication_budget=_only(problem, replica, problem.communication_budget),
                memory_budget=_only(problem, replica, problem.memory_budget),
            ),
        )
        for choice in itertools.product(depths, repeat=slots):
            operations = np.zeros((rows, blocks, heads), dtype=np.uint8)
            for slot, depth in enumerate(choice):
                operations[slot * problem.replicas + replica] = 1
                operations[slot * problem.replicas + replica, blocks - depth :] = 2
            if keeps_budgets(alone.problem, operations):
                best = max(best, score(alone, operations))
        total += best
    return total if math.isfinite(total) else None


def _only(problem: PlanProblem, replica: int, budget: np.ndarray) -> np.ndarray:
    of_replica = np.arange(problem.num_devices) // (problem.stages * problem.ranks) == replica
    return np.where(of_replica, budget, math.inf)


PROVED = 3e-5
"""How near its optimum a planner's plan is if it says "optimal" (`prices.RELATIVE_GAP`, and rounding)."""


def faults(instance: Instance, planner: str, solve: Any, **options: Any) -> list[str]:
    """What is wrong with a planner's answer to an instance, one line a fault. solve: `d2ft_hpc.planning.solve`."""
    problem, found = instance.problem, []
    given = dict(options)
    if "most_shortcut" in PLANNERS[planner]:
        given["most_shortcut"] = instance.most_shortcut
    try:
        plan = solve(problem, planner, **given)
    except PlanError as error:
        return _faults_of_refusal(instance, planner, str(error), options)
    if not keeps_budgets(problem, plan.operations):
        found.append("breaks a budget")
    small = SMALLEST * max(1.0, abs(plan.bound))
    if abs(plan.objective - score(instance, plan.operations)) > small:
        found.append("states another objective than it has")
    if plan.bound < plan.objective - small:
        found.append("states a bound below its objective")
    if abs(plan.gap - ((plan.bound - plan.objective) / plan.bound if plan.bound else 0.0)) > 1e-9:
        found.append("states another gap than it has")
    demanded = dataclasses.replace(instance, most_shortcut=given.get("most_shortcut", 1.0))
    if not keeps_demands(demanded, plan.operations):
        found.append("keeps no most_shortcut")
    best: float | None
    if planner in ("makespan", "static"):
        if planner == "makespan" and not is_in_lock_step(demanded, plan.operations):
            found.append("is not in lock step")
        if planner == "makespan":
            both = best_in_lock_step(demanded)
            best, most = (None, math.inf) if both is None else both
        else:
            best = best_static(demanded)
            most = best if best is not None else math.inf
    elif planner == "depth":
        best = best_by_depth(demanded)
        most = math.inf if best is None else best
    else:
        of_all = best_of_all(demanded)
        best, most = (None, math.inf) if of_all is None else of_all[:2]
        if of_all is not None and not keeps_budgets(problem, of_all[2]):
            most = best = of_all[0]  # meetings are limited: a bound on what is allowed
            if keeps_meetings_free(problem):
                found.append("oracle breaks a budget")
    if best is None:
        return [*found, "plans where none exists"]
    if plan.bound < best - small:
        found.append(f"bound below the optimum by {1 - plan.bound / best:.1e}")
    if plan.objective > most * (1 + 1e-7) + small:
        found.append(f"better than the optimum by {plan.objective / most - 1:.1e}")
    if plan.status == "optimal" and plan.objective < best * (1 - PROVED) - small:
        found.append(f"optimal, but {1 - plan.objective / best:.1e} below the optimum")
    if plan.status == "optimal" and plan.gap > 1e-4:
        found.append(f"optimal with a gap of {plan.gap:.1e}")
    is_late = "time limit" in plan.status  # as HiGHS may be on a busy machine
    if planner in PROVES and plan.status != "optimal" and not is_late:
        found.append(
            f"not proved: {plan.status}, gap {plan.gap:.1e}, of {1 - plan.objective / max(best, 1e-9):.1e}"
        )
    return found


def keeps_meetings_free(problem: PlanProblem) -> bool:
    return not any(problem.meeting_cost)


def _faults_of_refusal(instance: Instance, planner: str, message: str, options: dict[str, Any]) -> list[str]:
    problem = instance.problem
    meets = any(problem.meeting_cost) and bool(np.isfinite(problem.communication_budget).any())
    if planner in ("makespan", "static"):
        if not holds_alike(problem):
            return []
        exists = (best_in_lock_step(instance) if planner == "makespan" else best_static(instance)) is not None
        return [f"refuses where there is a plan: {message}"] if exists else []
    if planner == "depth":
        exists = best_by_depth(instance) is not None
        return [f"refuses where there is a plan: {message}"] if exists else []
    if planner == "joint":
        if "exceeds the communication budget" in message:
            return [] if meets else [f"breaks a budget: {message}"]
        return [f"refuses where there is a plan: {message}"] if best_of_all(instance) is not None else []
    allowed = ["exceeds the memory budget"] + (["exceeds the communication budget"] if meets else [])
    if planner == "last_blocks":
        allowed = ["exceeds the"]
    return [] if any(reason in message for reason in allowed) else [f"refuses: {message}"]


PLANNERS: dict[str, set[str]] = {
    "dense": set(),
    "paper": {"full_share"},
    "joint": {"most_shortcut", "time_limit_seconds", "relative_gap"},
    "makespan": {"most_shortcut", "time_limit_seconds"},
    "static": {"most_shortcut", "heads_multiple"},
    "depth": {"time_limit_seconds"},
    "random": {"seed", "full_share"},
    "last_blocks": set(),
    "stochastic_depth": {"seed"},
    "pruning": set(),
    "routing": {"capacity_factor"},
}
"""The options of every planner."""
PROVES = ("joint", "makespan", "static", "depth")
