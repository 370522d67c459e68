"""How many FULL subnets each rank has memory for, by what was measured at the start."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from d2ft_hpc.engines.engine import Engine
from d2ft_hpc.launch import agreed, gathered
from d2ft_hpc.lifecycle import PlanCosts
from d2ft_hpc.metering.activation_bytes import ActivationBytes
from d2ft_hpc.metering.memory import free_bytes
from d2ft_hpc.parallel.rank_layout import Placement
from d2ft_hpc.training.job import Job
from d2ft_hpc.training.plan_costs import keep_costs

HEADROOM = 0.1
"""Share of the free memory that is reserved for a backward's temporary tensors and for gaps."""


def with_memory_limits(
    job: Job, engine: Engine, placement: Placement, kept: ActivationBytes | None, costs: PlanCosts
) -> PlanCosts:
    """The costs, with the most FULL subnets of each rank if some rank lacks the memory for a dense micro-batch. All
    ranks call it together, once their engines are built. kept: bytes that this rank keeps; None: the costs stay as
    they are, as in a resumed run.
    """
    control = job.control
    if kept is None or costs.free_bytes is not None:
        return costs
    control.all_gather(b"")  # what others still build would count as free
    free = free_bytes(job.device)
    if job.device.type == "cpu":
        free /= control.hosts.count(control.host)
    free = (1 - HEADROOM) * free - engine.bytes_to_come
    most = most_full(free, kept, placement, job.config.data.slots)
    of_ranks = gathered(control, [free, most, float(placement.own.sum())])
    of_all, limits, subnets = (list(column) for column in zip(*of_ranks, strict=True))
    costs = replace(costs, free_bytes=of_all, most_full=None if limits == subnets else limits)
    with agreed(control, "keeping the costs"):
        if control.rank == 0:
            keep_costs(job, costs)
    return costs


def most_full(free: float, kept: ActivationBytes, placement: Placement, slots: int) -> float:
    """The most FULL subnets of a micro-batch whose activations fit on this rank, from none to all of its own. A
    pipeline stage keeps as many micro-batches at once as there are stages from it to the last.
    """
    layout, own = placement.layout, float(placement.own.sum())
    at_once = min(layout.stages - layout.stage, slots)
    unowned = kept.unowned * len(placement.blocks) / len(placement.owner)
    fitting = (free / at_once - unowned) / kept.by_full if kept.by_full else math.inf
    return own if math.isnan(fitting) else max(0.0, min(own, float(math.floor(min(fitting, own)))))


def describe_memory(costs: PlanCosts, kept: ActivationBytes, num_subnets: int) -> str:
    """One line that says what was measured and what follows."""
    free = _range(costs.free_bytes or [])
    line = f"memory: a dense micro-batch keeps {_size(kept.of(num_subnets))}, ranks have room for {free}"
    if costs.most_full is None:
        return line
    told = ", ".join(f"{most:.0f} on rank {rank}" for rank, most in enumerate(costs.most_full))
    return f"{line}; FULL subnets of a micro-batch at most: {told}"


def _range(sizes: Sequence[float]) -> str:
    least, most = _size(min(sizes)), _size(max(sizes))
    return least if least == most else f"{least} to {most}"


def _size(size: float) -> str:
    return f"{size / 2**30:.2f} GiB" if abs(size) >= 2**30 / 10 else f"{size / 2**20:.1f} MiB"
