"""Makes a user's DeepSpeed engine follow plans: when a batch begins, measure, solve, check, and put in force."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from d2ft_hpc.engines.deepspeed_private import current_slot, loss_scale
from d2ft_hpc.engines.portable import write_file
from d2ft_hpc.engines.zero import ZeroRules
from d2ft_hpc.engines.zero_state import collect
from d2ft_hpc.execution.executor import PlanExecutor
from d2ft_hpc.launch import Control, share
from d2ft_hpc.metering import StepCosts
from d2ft_hpc.planning import SkipPlan
from d2ft_hpc.scores import Scores, weight_magnitude
from d2ft_hpc.scores.observe import GradientObserver
from d2ft_hpc.training.plans import UNSCORED, rows_of_all, solve_slots
from d2ft_hpc.user_loop.section import D2ftSection


class PlanFollower:
    """What `initialize` adds to a DeepSpeed engine, as `engine.d2ft`.

    Batches of which scores are measured run dense; a plan is in force from the batch after them.
    """

    def __init__(
        self,
        model: VisionTransformer,
        executor: PlanExecutor,
        section: D2ftSection,
        rules: ZeroRules,
        costs: StepCosts,
        control: Control,
    ) -> None:
        self.executor, self.section, self.control = executor, section, control
        self.scores: Scores | None = None
        """Those of the newest plan; None where the planner reads none."""
        self.planning_seconds = 0.0
        """Time that scoring's collectives and solving took so far; the dense probe steps come on top."""
        self._model, self._rules, self._costs = model, rules, costs
        self._twin = rules.twin_of(model)
        self._engine: Any = None
        self._observer: GradientObserver | None = None
        self._batches = 0  # begun since the newest plan was made
        self._seen = -1
        self._plans_made = 0
        # Before DeepSpeed's own hooks, which gather weights.
        model.register_forward_pre_hook(self._before_forward)

    @property
    def plan(self) -> SkipPlan | None:
        """The plan in force; None while steps run dense."""
        return self.executor.plan

    def slot(self) -> int:
        """The place in its batch of the micro-batch that runs."""
        return current_slot(self._engine)

    def begin(self, engine: Any) -> None:
        """Once, with the engine that DeepSpeed made; on all ranks together."""
        self._engine = engine
        reason = self._rules.same_rows(self._model)
        if reason is not None:
            self._say(f"one plan for all replicas: {reason}")
        if self.section.plan is not None:
            self.follow(SkipPlan.load(self.section.plan))
        elif not self._needs_scores:
            self._make_plan(None)

    def follow(self, plan: SkipPlan) -> None:
        """Puts `plan` in force from the next batch on. Raises PlanError where this engine cannot run it."""
        self._rules.check(plan, self._model, self._engine)
        self.executor.load(plan, self.control.rank)
        self._batches = 0

    def save(self, folder: str | Path) -> None:
        """Writes weights and optimiser in timm's names, plan and scores to `folder`; on all ranks together."""
        folder = Path(folder)
        state = collect(self._model, self._engine)
        if self.control.rank == 0:
            state.save(folder, write_file)
            if self.plan is not None:
                self.plan.save(folder / "plan.h5")
            if self.scores is not None:
                np.savez(folder / "scores.npz", forward=self.scores.forward, backward=self.scores.backward)

    def overhead(self) -> str:
        """What following plans has cost so far, in words."""
        steps = max(int(self._engine.global_steps), 1)
        return (
            f"following the plan {1e6 * self.executor.lookup_seconds / steps:.0f} us a step, "
            f"planning {1e6 * self.planning_seconds / steps:.0f} us a step over {steps} steps"
        )

    @property
    def _needs_scores(self) -> bool:
        return self.section.planner not in UNSCORED

    def _before_forward(self, model: nn.Module, inputs: Any) -> None:
        if not model.training or not torch.is_grad_enabled() or self._engine is None:
            return
        micro_step = int(self._engine.micro_steps)
        if micro_step != self._seen and self.slot() == 0:
            self._begin_batch()
        self._seen = micro_step

    def _begin_batch(self) -> None:
        due = self.plan is None and self.section.plan is None
        due = due or (self.section.replan.every is not None and self._batches >= self.section.replan.every)
        if self._observer is not None and self._batches >= self.section.probe_batches:
            self._make_plan(self._observer)
        elif due and self._observer is None:
            self._batches = 0
            if self._needs_scores:
                self.executor.unload()
                slots = int(self._engine.gradient_accumulation_steps())
                scale = lambda: loss_scale(self._engine)  # noqa: E731
                self._observer = GradientObserver(self._model, self.executor.subnets, slots, self.slot, scale)
            else:
                self._make_plan(None)
        self._batches += 1

    def _make_plan(self, observer: GradientObserver | None) -> None:
        start = time.perf_counter()
        self.scores = None if observer is None else self._collect_scores(observer)
        self._observer = None

        def solve() -> bytes:
            return solve_slots(
                self.section,
                self.scores,
                slots=int(self._engine.gradient_accumulation_steps()),
                replicas=int(self._engine.dp_world_size),
                subnets=self.executor.subnets.shape,
                forward_cost=self._costs.forward_share,
                always_share=self._costs.always_share,
                device_speed=self.section.device_speed,
                replicas_meet=self._rules.stage == 3,
                seed=(self.section.seed, self._plans_made),
                same_rows=self._rules.same_rows(self._model) is not None,
            ).to_bytes()

        plan = SkipPlan.from_bytes(share(self.control, solve, "the plan"))
        self._plans_made += 1
        self.follow(plan)
        seconds = time.perf_counter() - start
        self.planning_seconds += seconds
        self._say(
            f"plan {plan.hash[:12]} ({plan.planner}, {plan.status}, gap {plan.gap:.1e}): "
            f"{self._costs.planned_share(plan):.1%} of the dense compute, made in {seconds:.2f} s"
        )

    def _collect_scores(self, observer: GradientObserver) -> Scores:
        observer.close()
        fisher = rows_of_all(self.control, observer.sums / self.section.probe_batches)
        names = (self.section.forward_score, self.section.backward_score)
        if self.section.backward_score == "fisher":
            return Scores(fisher, fisher, 0.0, *names, 0)
        with self._rules.full_model(self._model, self._twin) as model:
            magnitude = weight_magnitude(model, self.executor.subnets).cpu().numpy()
        return Scores(fisher, np.broadcast_to(magnitude, fisher.shape), 0.0, *names, 0)

    def _say(self, text: str) -> None:
        if self.control.rank == 0:
            print(f"d2ft: {text}", flush=True)
