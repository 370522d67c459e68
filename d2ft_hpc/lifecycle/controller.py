"""The controller of a run's plans; the package's docstring shows its flow."""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial
from typing import Protocol

from d2ft_hpc.execution.executor import PlanExecutor
from d2ft_hpc.launch import Control, share
from d2ft_hpc.lifecycle.background import BackgroundSolver
from d2ft_hpc.lifecycle.context import PlanContext
from d2ft_hpc.lifecycle.make_plan import make_plan, reads_scores, token_layout_of
from d2ft_hpc.lifecycle.state import PlanState
from d2ft_hpc.parallel.tensor import TensorParallelExecutor
from d2ft_hpc.planning import SkipPlan
from d2ft_hpc.scores import Scores


class PlannedEngine(Protocol):
    """What the controller needs of an engine, or of a loop that has none."""

    executor: PlanExecutor

    @property
    def same_rows(self) -> str | None:
        """Why all replicas must follow the same rows of a plan; None where they need not."""
        ...

    def check(self, plan: SkipPlan) -> None:
        """Raises PlanError or ConfigError where `plan` cannot be run exactly."""
        ...


class ScoreSource:
    """Where a run's scores come from; all ranks call every method together."""

    @property
    def is_observing(self) -> bool:
        """Whether scores are being taken from batches of the training."""
        return False

    def measure(self) -> Scores | None:
        """Scores for the next plan at once; None: they come from the next batch, which runs dense."""
        return None

    def collect(self) -> Scores | None:
        """Called after those batches: their scores, or None if more batches have to be observed."""
        raise NotImplementedError

    def stop(self) -> None:
        """Takes no scores from batches any more."""


class PlanListener:
    """What a host gets to know; it need not listen to anything."""

    def enter(self, phase: str, *, allowed_seconds: float = 0.0) -> None:
        """What the rank does from now on, for at most so long."""

    def say(self, text: str) -> None:
        """A line for people."""

    def scored(self, scores: Scores, step: int) -> None:
        """Scores of the plan that is made next."""

    def planned(self, plan: SkipPlan, step: int, seconds: float) -> None:
        """A plan is in force; `step` is the first one under it."""

    def note(self, step: int, kind: str, text: str, seconds: float = 0.0) -> None:
        """An event of plans, for a record."""


class PlanController:
    """Makes plans when they are due and puts them in force; all ranks call every method together, between batches."""

    def __init__(
        self,
        context: PlanContext,
        engine: PlannedEngine,
        control: Control,
        source: ScoreSource,
        listener: PlanListener,
    ) -> None:
        self.context, self.engine, self.control = context, engine, control
        self.source, self.listener = source, listener
        self._has_told_of_no_scores = False
        self.scores: Scores | None = None
        """The scores of the newest plan; None where the planner reads none."""
        self.plans_made = 0
        self.batches = 0
        """Batches begun under the newest plan, or since scores are taken from batches."""
        self.planning_seconds = 0.0
        """Seconds that making plans has taken so far, without the batches that scores were taken from."""
        self._background = BackgroundSolver(control)

    @property
    def plan(self) -> SkipPlan | None:
        """The plan in force; None while batches run dense."""
        return self.engine.executor.plan

    def before_batch(self, step: int, *, due: bool | None = None) -> None:
        """Puts the plan in force that batch `step` runs under, at the resolution of the step.

        due: whether a plan is to be made now; None: as soon as there is none, or the one in force has had its
        `replan.every` steps.
        """
        if self.source.is_observing:
            due = self.batches > 0
        elif due is None:
            interval = self.context.settings.replan.interval
            due = self.plan is None or (interval is not None and self.batches >= interval.number)
        if due:
            self.make(step, may_overlap=self.context.settings.replan.overlap and self.plans_made > 0)
        self._take_over(step)
        if self.plan is not None and self.plan != (scaled := self.context.scaled(self.plan, step)):
            batches = self.batches
            self._put_in_force(scaled, step, 0.0)
            self.batches = batches  # it is the same plan, on larger images
        self.batches += 1

    def check(self, plan: SkipPlan) -> None:
        """Raises PlanError where this engine cannot run `plan`, or nobody has counted what it costs."""
        self.engine.check(plan)
        self.context.costs.check(plan)

    def activate(self, plan: SkipPlan) -> None:
        """Puts `plan` in force from the next batch on. Raises PlanError where this engine cannot run it."""
        self.check(plan)
        executor = self.engine.executor
        if isinstance(executor, TensorParallelExecutor):
            executor.use(token_layout_of(plan, self.context))
        executor.activate(plan, self.context.placement.layout.replica)
        self.batches = 0

    def settle(self, step: int) -> None:
        """Waits for a plan that is still being solved, so that a checkpoint holds the one in force."""
        self._take_over(step, wait=True)

    def state(self) -> PlanState:
        """What the next plans follow from, except scores that are still being taken."""
        return PlanState(self.plan, self.batches, self.plans_made, self.scores)

    def restore(self, state: PlanState) -> None:
        """Goes on from `state`. Raises PlanError, before anything changes, where this engine cannot run its plan."""
        if state.plan is not None:
            self.check(state.plan)
        self.source.stop()
        self.engine.executor.deactivate()
        if state.plan is not None:
            self.activate(state.plan)
        self.batches, self.plans_made, self.scores = state.batches, state.plans_made, state.scores

    def make(self, step: int, *, may_overlap: bool = False) -> None:
        """Puts the next plan in force; or only starts it, if it may be solved while training goes on, or if its
        scores come from batches."""
        start = time.perf_counter()
        if may_overlap and self._background.is_under_way:
            self.listener.note(step, "replan", "skipped: the plan before is still being solved")
            return
        settings = self.context.settings
        self.scores = None
        if reads_scores(settings):
            self.listener.enter("scoring")
            is_observed = self.source.is_observing
            self.scores = self.source.collect() if is_observed else self.source.measure()
            if self.scores is None:
                if is_observed and not self._has_told_of_no_scores:
                    self._has_told_of_no_scores = True
                    self.listener.say(
                        "a batch with gradients that are zero, absent or not finite gives no scores: all run dense "
                        "until one does"
                    )
                self.engine.executor.deactivate()
                self.batches = 0
                return
            self.listener.scored(self.scores, step)
        self.listener.enter("planning", allowed_seconds=settings.time_limit_seconds)
        same_rows = self.engine.same_rows
        if same_rows is not None and self.plans_made == 0:
            self.listener.say(f"one plan for all replicas: {same_rows}")
        context = replace(self.context, same_rows=same_rows is not None)
        solve = partial(make_plan, context, self.scores, self.plans_made)
        if may_overlap:
            self._background.start(solve)
            seconds = time.perf_counter() - start
            self.listener.note(step, "replan", "scores measured, solving begins", seconds)
            return
        # Rank 0 solves; every rank gets the same plan or raises the same PlanError.
        plan = SkipPlan.from_message(share(self.control, lambda: solve().to_message(), "the plan"))
        self._put_in_force(plan, step, time.perf_counter() - start)

    def _take_over(self, step: int, *, wait: bool = False) -> None:
        """Puts a plan in force that was solved meanwhile."""
        made = self._background.at_boundary(wait=wait)
        if made is None:
            return
        if made.plan is None:
            self.listener.say(f"no new plan, the old one stays: {made.fault}")
            self.listener.note(step, "replan", f"failed: {made.fault}", made.seconds)
            return
        self._put_in_force(made.plan, step, made.seconds)

    def _put_in_force(self, plan: SkipPlan, step: int, seconds: float) -> None:
        plan, curve = self.context.scaled(plan, step), self.context.curve
        self.activate(plan)
        if curve is not None and self.plans_made == 0:
            sizes = curve.in_words(self.engine.executor.images.patch_size)
            steps = sum(curve.steps)
            self.listener.say(
                f"images of {sizes}: {curve.share:.1%} of what full size takes in these {steps} steps"
            )
        self.planning_seconds += seconds
        executor = self.engine.executor
        tokens = f", tokens {executor.token_layout}" if isinstance(executor, TensorParallelExecutor) else ""
        self.listener.say(
            f"from step {step + 1} on: {plan.in_words(executor.images.patch_size)}, "
            f"{self.context.costs.planned_share(plan):.1%} of a dense step's compute, made in {seconds:.2f} s{tokens}"
        )
        self.listener.planned(plan, step, seconds)
        self.plans_made += 1
