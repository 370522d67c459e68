"""A user's DeepSpeed engine under plans: tells the controller where batches begin, and carries plans in checkpoints."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from d2ft_hpc.engines.deepspeed import DeepSpeedEngine
from d2ft_hpc.engines.deepspeed_private import loss_scale
from d2ft_hpc.engines.model_parallel import CutEngine
from d2ft_hpc.engines.pipeline import PipelineEngine
from d2ft_hpc.engines.planned_bytes import PlannedBytes
from d2ft_hpc.engines.portable import write_file
from d2ft_hpc.errors import PlanError
from d2ft_hpc.families.table import backbone_of
from d2ft_hpc.files import atomic
from d2ft_hpc.launch import Control, agreed, share
from d2ft_hpc.lifecycle import PlanContext, PlanController, PlanState
from d2ft_hpc.lifecycle.foresight import foresee_plans
from d2ft_hpc.lifecycle.make_plan import reads_scores
from d2ft_hpc.lifecycle.observed_scores import ObservedScores, Observer
from d2ft_hpc.lifecycle.state import FILE
from d2ft_hpc.planning import SkipPlan
from d2ft_hpc.scores import Scores
from d2ft_hpc.scores.gradient_observer import GradientObserver
from d2ft_hpc.selection import SampleSelection
from d2ft_hpc.user_loop.attached import (
    observe_again_if_incomplete,
    resume,
    tell_if_too_long,
    tell_if_too_short,
    tell_of_dead_classifier,
    tell_of_graphs,
)
from d2ft_hpc.user_loop.batch_counter import BatchCounter, ComputeSoFar, samples_in
from d2ft_hpc.user_loop.choosing import choose_from
from d2ft_hpc.user_loop.part_observer import PartObserver
from d2ft_hpc.user_loop.plan_printer import PlanPrinter, compute_in_words
from d2ft_hpc.user_loop.record import LoopRecord
from d2ft_hpc.user_loop.section import D2ftSection
from d2ft_hpc.user_loop.settings_kept import check_planner, settings_to_keep

_TRAIN = (
    "call engine.train() before the loop, and after evaluations (from_pretrained gives models that evaluate)"
)


class PlannedDeepSpeed:
    """What `initialize` adds to a DeepSpeed engine, as `engine.d2ft`.

    Batches that scores are measured from run dense; a plan is in force from the batch after them.
    """

    def __init__(
        self,
        ours: DeepSpeedEngine | PipelineEngine,
        context: PlanContext,
        selection: SampleSelection | None,
        control: Control,
        counter: BatchCounter,
        record: LoopRecord,
        planned_bytes: PlannedBytes,
    ) -> None:
        """On all ranks together. ours: the user's engine as our training loop has it. selection: of planner samples.
        counter, planned_bytes: of this rank's part of the model."""
        self.executor, self.control = ours.executor, control
        self._ours, self._engine, self._selection = ours, ours.engine, selection
        assert isinstance(context.settings, D2ftSection)
        self._settings, self._placement = context.settings, context.placement
        self._source = ObservedScores(
            context.settings,
            self.executor.subnets,
            lambda: (control, context.placement.layout),
            self._make_observer,
            ours.full_model,
        )
        self._printer = PlanPrinter(control)
        self.plans = PlanController(context, ours, control, self._source, self._printer)
        self._saved_steps = 0
        tell_if_too_short(self.plans, self._position)
        tell_of_graphs(self.plans, self._engine.device)
        tell_of_dead_classifier(self.plans, self._engine.module)
        self.slot = 0
        """The place in its batch of the micro-batch that runs, or ran last, in training."""
        self.is_boundary = False
        """Whether an optimiser step follows it."""
        self._begun = -1  # the step of the batch that runs, or ran last
        self._first_micro_step = self._passes = 0  # DeepSpeed's count as it began, and its forwards
        self._says_boundaries = False  # the script, in place of DeepSpeed's count
        self._counter, self._planned_bytes = counter, planned_bytes
        self.record = record
        """What the script can add to its `results.h5`: `record.evaluation`, `record.close`."""
        if isinstance(ours, PipelineEngine):
            self._lead_batches(ours)
        else:
            # Of the engine, so that copies of its module have none, and torch.compile sees none.
            ours.engine.register_forward_pre_hook(self._before_forward, with_kwargs=True)
            ours.engine.register_forward_hook(self._after_forward)
            self._lead_steps()
        self._follow_checkpoints()
        if reads_scores(context.settings):
            foresee_plans(self.plans)
        else:
            self._printer.held = []  # of step 1, unless a checkpoint is loaded
            self.plans.make(0)

    @property
    def plan(self) -> SkipPlan | None:
        """The plan in force; None while steps run dense."""
        return self.executor.plan

    @property
    def scores(self) -> Scores | None:
        """Scores of the newest plan; None where the planner reads none."""
        return self.plans.scores

    def choose(self, micro_batches: Sequence[Any]) -> list[Any]:
        """For planner `samples`: takes a batch as (images, labels) for each micro-batch, or as text by name
        (`PlannedLoop.choose`), and returns the samples that are to be trained on, in as many micro-batches of the same
        kind. All ranks call it together, between two steps.

        Raises PlanError with another planner, in evaluation mode, or for what it cannot draw from.
        """
        return choose_from(micro_batches, self._settings, self._counter, self._begin_draw)

    def _begin_draw(self, samples: int) -> tuple[SampleSelection, int]:
        assert self._selection is not None
        # A pipeline's `train_batch` sees to the mode.
        if not (self._engine.module.training or isinstance(self._ours, PipelineEngine)):
            raise PlanError(f"choose() draws what trains, but the engine is in evaluation mode: {_TRAIN}")
        self._turn_to("forward")
        return self._selection, int(self._engine.global_steps)

    def activate(self, plan: SkipPlan) -> None:
        """Puts `plan` in force from the next batch on. Raises PlanError where this engine cannot run it."""
        self.plans.activate(plan)

    def save(self, folder: str | Path) -> None:
        """Writes weights and optimiser in timm's names, plan and scores to `folder`; all ranks call it together."""
        folder = Path(folder)
        self._ours.save(folder, write_file)
        if self.control.rank == 0:
            if self.plan is not None:
                self.plan.write(folder / "plan.h5")
            if self.scores is not None:
                with atomic.replaced(folder / "scores.npz") as temporary, temporary.open("wb") as file:
                    np.savez(file, forward=self.scores.forward, backward=self.scores.backward)

    def report(self) -> str:
        """Two lines of this rank: what the plan in force and all steps so far promised and computed, of dense ones."""
        return compute_in_words(self._counter, self.plans.context, int(self._engine.global_steps))

    def overhead(self) -> str:
        """What following plans has cost so far, in words."""
        steps = max(int(self._engine.global_steps), 1)
        return (
            f"following the plan {1e6 * self.executor.lookup_seconds / steps:.0f} us a step, "
            f"planning {1e6 * self.plans.planning_seconds / steps:.0f} us a step over {steps} steps"
        )

    def _follow_checkpoints(self) -> None:
        """The engine's `save_checkpoint` and `load_checkpoint` carry the plan, too, and all that the next ones follow
        from."""
        engine, save, load = self._engine, self._engine.save_checkpoint, self._engine.load_checkpoint

        def save_checkpoint(save_dir: Any, tag: Any = None, *args: Any, **kwargs: Any) -> Any:
            tag = f"global_step{engine.global_steps}" if tag is None else str(tag)
            compute = astuple(self._counter.so_far)
            state = replace(self.plans.state(), observed=self._source.so_far(), compute=compute)
            content = replace(state, settings=settings_to_keep(self._settings)).to_bytes()
            self._saved_steps = int(engine.global_steps)
            with agreed(self.control, "saving the plan"):
                if self.control.rank == 0:  # before DeepSpeed says that this checkpoint is the latest
                    folder = Path(save_dir) / tag
                    folder.mkdir(parents=True, exist_ok=True)
                    atomic.write(folder / FILE, content)
            return save(save_dir, tag, *args, **kwargs)

        def load_checkpoint(*args: Any, **kwargs: Any) -> Any:
            found = load(*args, **kwargs)
            self._begun = -1
            asked = inspect.signature(load).bind(*args, **kwargs).arguments
            if found[0] is not None and not asked.get("load_module_only"):
                self._resume(Path(found[0]).parent / FILE)
            return found

        engine.save_checkpoint, engine.load_checkpoint = save_checkpoint, load_checkpoint

    def _resume(self, path: Path) -> None:
        """Goes on from the file, if there is one; all ranks call it together. A plan that the configuration names
        stays. Raises CheckpointError where the file is damaged."""
        content = share(self.control, lambda: path.read_bytes() if path.exists() else b"", "the saved plan")
        say, has_own_plan = self.plans.listener.say, self._settings.file is not None
        if not content:
            if not has_own_plan:
                say(f"{path} is missing, which a checkpoint of ours has: plans begin anew")
            return
        saved = PlanState.from_bytes(content, str(path))
        self._counter.so_far = ComputeSoFar(*saved.compute)  # whatever becomes of the plan
        if has_own_plan:
            return
        check_planner(saved.settings, self._settings, str(path), "the d2ft section")
        steps, held = int(self._engine.global_steps), self._printer.held
        try:
            self._printer.held = None
            resume(self.plans, saved, steps)
        except PlanError as error:
            self._printer.held = held
            say(f"the checkpoint's plan does not fit, plans begin anew: {error}")
            return
        self._saved_steps = steps
        ranks_and_slots = self.control.world_size, self.plans.context.slots
        if saved.observed is not None and saved.observed.shape[:2] == ranks_and_slots:
            self._source.go_on(saved.observed)

    def _lead_batches(self, pipeline: PipelineEngine) -> None:
        """A pipeline's batches begin with its `train_batch`."""
        train_batch = pipeline.engine.train_batch

        def planned_batch(*args: Any, **kwargs: Any) -> Any:
            self._begin_batch()
            self._turn_to("backward")
            pipeline.begin_batch()
            for slot in range(int(self._engine.gradient_accumulation_steps())):
                self._counter.train(slot, int(self._engine.train_micro_batch_size_per_gpu()))
            step, rate = int(self._engine.global_steps), float(self._engine.get_lr()[0])
            loss = train_batch(*args, **kwargs)
            self.record.loss(loss)
            self._end_batch(step, rate)
            return loss

        pipeline.engine.train_batch = planned_batch

    def _lead_steps(self) -> None:
        """Losses and the ends of batches are those that the script's `backward` and `step` see."""
        engine, backward, take_step = self._engine, self._engine.backward, self._engine.step
        set_boundary = engine.set_gradient_accumulation_boundary

        def noted_backward(loss: Any, *args: Any, **kwargs: Any) -> Any:
            if isinstance(loss, torch.Tensor) and loss.numel() == 1:
                self.record.loss(loss)
            return backward(loss, *args, **kwargs)

        def noted_boundary(is_boundary: bool | None) -> None:
            self._says_boundaries = is_boundary is not None
            set_boundary(is_boundary)

        def noted_step(*args: Any, **kwargs: Any) -> Any:
            self._require_forward()
            self._turn_to("optimizer")
            step, rate = int(engine.global_steps), float(engine.get_lr()[0])
            with self._counter.optimizer_step():
                result = take_step(*args, **kwargs)
            if int(engine.global_steps) != step:
                self._end_batch(step, rate)
                fix = f'write "gradient_accumulation_steps": {self.slot + 1}'
                observe_again_if_incomplete(self.plans, self._source, self.slot + 1, fix)
            return result

        engine.backward, engine.step = noted_backward, noted_step
        engine.set_gradient_accumulation_boundary = noted_boundary

    def _require_forward(self) -> None:
        """Raises PlanError where the optimizer is about to step after a batch of which no hook of ours has seen a
        forward in training."""
        engine = self._engine
        if engine.is_gradient_accumulation_boundary() and self._begun != int(engine.global_steps):
            fix = (
                "call engine(...), not engine.forward or engine.module" if engine.module.training else _TRAIN
            )
            raise PlanError(
                f"the optimizer steps, but the engine was not called in training mode, so that no plan is followed: "
                f"{fix}"
            )

    def _end_batch(self, step: int, learning_rate: float) -> None:
        tell_if_too_long(self.plans, step)
        self.record.gradient_norm(self._engine.get_global_grad_norm())
        work = self._counter.end(self._placement, self._source.flops_of_batch)
        self.record.end_batch(
            step, work, self.plans, learning_rate, self._planned_bytes, recomputes=self._counter.recomputes
        )
        self._turn_to("data")

    def _turn_to(self, phase: str) -> None:
        if self.record.is_on:
            self.record.turn_to(phase, self.plans, self._engine.device, int(self._engine.global_steps))

    def _before_forward(self, engine: nn.Module, args: Any, kwargs: Any) -> None:
        if not self._is_training:
            self._counter.begin_evaluation()
            if self.is_boundary:  # and that step is done
                self.record.pause()
            return
        self.executor.forward_trains = True
        # Read here and not in the blocks: torch.compile would make kernels anew for each value of DeepSpeed's counter.
        micro_step = int(self._engine.micro_steps)
        if self._begun != int(self._engine.global_steps):
            self._begin_batch()
            self._begun = int(self._engine.global_steps)
            self._first_micro_step, self._passes = micro_step, 0
        # Scripts that say where a batch ends may call `step` there alone, by which DeepSpeed counts.
        self.slot = self._passes if self._says_boundaries else micro_step - self._first_micro_step
        self.is_boundary = bool(self._engine.is_gradient_accumulation_boundary())
        self._passes += 1
        self._require_slots(self.slot + 1)
        self._turn_to("forward")
        samples = samples_in([*args, kwargs])
        self._counter.train(self.slot, len(samples), samples)

    def _after_forward(self, engine: nn.Module, inputs: Any, output: Any) -> None:
        if self._is_training:
            self.executor.forward_trains = False
            self._counter.end_forward()
            self._turn_to("backward")
        else:
            self._counter.end_evaluation()

    @property
    def _is_training(self) -> bool:
        return self._engine.module.training and torch.is_grad_enabled()

    def _position(self) -> tuple[int, int]:
        return int(self._engine.global_steps), self._saved_steps

    def _begin_batch(self) -> None:
        self._require_slots(int(self._engine.gradient_accumulation_steps()))
        self._printer.release()
        self.plans.before_batch(int(self._engine.global_steps))

    def _require_slots(self, micro_batches: int) -> None:
        """Raises PlanError where a batch gets other micro-batches than plans have rows for."""
        slots, draws = self.plans.context.slots, self._settings.entry.binding == "sample"
        is_changed = slots != int(self._engine.gradient_accumulation_steps())
        if not draws and (is_changed or micro_batches > slots):
            raise PlanError(
                f"a step of {micro_batches} micro-batches, but plans have rows for {slots}, which "
                f"gradient_accumulation_steps said in DeepSpeed's configuration: it has to stay so "
                f"(set_train_batch_size changes it), and only fewer may come"
            )

    def _make_observer(self) -> Observer:
        engine, subnets = self._engine, self.executor.subnets
        slots = int(engine.gradient_accumulation_steps())
        if isinstance(self._ours, CutEngine):
            return PartObserver(self._ours.part, subnets, self._placement, slots, lambda: loss_scale(engine))
        return GradientObserver(
            backbone_of(engine.module), subnets, slots, lambda: self.slot, lambda: loss_scale(engine)
        )
