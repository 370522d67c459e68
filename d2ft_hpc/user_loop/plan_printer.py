"""Prints what users' own loops are told about their plans."""

from __future__ import annotations

from d2ft_hpc.launch import Control
from d2ft_hpc.lifecycle import PlanContext, PlanListener
from d2ft_hpc.user_loop.batch_counter import BatchCounter


class PlanPrinter(PlanListener):
    """Lines for the user, from rank 0."""

    def __init__(self, control: Control) -> None:
        self._control = control
        self.held: list[str] | None = None
        """Lines that are not printed yet, while there is a list."""

    def say(self, text: str) -> None:
        if self.held is not None:
            self.held.append(text)
        elif self._control.rank == 0:
            print(f"d2ft: {text}", flush=True)

    def release(self) -> None:
        """Prints what was held."""
        held, self.held = self.held or [], None
        for text in held:
            self.say(text)


def compute_in_words(counter: BatchCounter, context: PlanContext, steps: int) -> str:
    """Two lines of this rank, of dense training's compute: what the plan in force promises and what was measured under
    it, and the same of all steps so far. steps: done.

    What activation checkpointing recomputes was computed, so it counts as measured; dense training and promises have
    none.
    """
    executor = counter.executor
    plan, promised, measured = (
        executor.plan,
        counter.promised_share(context.placement),
        counter.measured_share,
    )
    again = " with recomputed activations" if counter.recomputes else ""
    if plan is None or promised is None:
        now = "no plan is in force, batches run dense"
    else:
        told = "not measured yet" if measured is None else f"measured {measured:.1%}{again}"
        now = f"{plan.in_words(executor.images.patch_size)}: promised {promised:.1%} of the dense compute, {told}"
    whole = ""
    if plan is not None and context.curve is not None and steps <= (context.total_steps or 0):
        share = context.share_of_run(plan)
        whole = f"; {share:.1%} in all {context.total_steps}, if they have equally many samples"
    so_far = counter.so_far
    if so_far.dense_flops == 0:
        return f"{now}\nnothing was measured yet{whole}"
    promised, measured, scores = (
        flops / so_far.dense_flops
        for flops in (so_far.planned_flops, so_far.executed_flops, so_far.score_flops)
    )
    beside = f", and {scores:.1%} for the scores of heads" if scores else ""
    told = f"promised {promised:.1%} of the dense compute, measured {measured:.1%}{again}{beside}"
    return f"{now}\n{steps} steps so far: {told}{whole}"
