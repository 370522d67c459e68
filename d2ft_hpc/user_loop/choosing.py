"""`choose` of loops and DeepSpeed scripts, for planner `samples`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from d2ft_hpc.errors import PlanError
from d2ft_hpc.plan_config import PlanConfig
from d2ft_hpc.planning import Operation
from d2ft_hpc.selection import SampleSelection
from d2ft_hpc.selection.batch import as_given, batches_of, samples_of
from d2ft_hpc.user_loop.batch_counter import BatchCounter


def choose_from(
    given: Sequence[Any],
    settings: PlanConfig,
    counter: BatchCounter,
    begin: Callable[[int], tuple[SampleSelection, int]],
) -> list[Any]:
    """What is to be trained on of the micro-batches of a batch, each of the kind that was given.

    begin: puts the batch's plan in force; gets the samples of the first micro-batch, and gives what draws and the
    number of this draw, from 0.

    Raises PlanError with another planner, for what it cannot draw from, or where the budget leaves not one sample.
    """
    if settings.entry.binding != "sample":
        raise PlanError(
            f"choose() draws samples for planner 'samples'; with {settings.planner!r} train on all of them"
        )
    executor = counter.executor
    batches = batches_of(given, are_images=executor.subnets.family.takes_images)
    selection, draw = begin(len(samples_of(batches[0])))
    assert executor.plan is not None
    share = float((executor.plan.operations == Operation.FULL).mean())
    with counter.score([samples_of(batch) for batch in batches]):
        return as_given(selection(batches, draw, share), given)
