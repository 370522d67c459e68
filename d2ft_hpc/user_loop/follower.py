"""Makes a user's DeepSpeed engine follow plans: when a batch begins, measure, solve, check, and put in force."""

from __future__ import annotations

import inspect
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from d2ft_hpc.engines.deepspeed import DeepSpeedEngine
from d2ft_hpc.engines.deepspeed_private import current_slot, loss_scale
from d2ft_hpc.engines.engine import MicroBatch
from d2ft_hpc.engines.pipeline import PipelineEngine
from d2ft_hpc.engines.portable import write_file
from d2ft_hpc.engines.tensor import TensorParallelEngine
from d2ft_hpc.errors import PlanError
from d2ft_hpc.files import atomic
from d2ft_hpc.launch import Control, agreed, share
from d2ft_hpc.metering import StepCosts
from d2ft_hpc.parallel.layout import Placement
from d2ft_hpc.planning import Operation, SkipPlan, plan_samples
from d2ft_hpc.scores import Scores, weight_magnitude
from d2ft_hpc.scores.observe import GradientObserver
from d2ft_hpc.selection import SampleSelection
from d2ft_hpc.training.plans import by_device, solve_slots
from d2ft_hpc.user_loop.observe_part import PartObserver
from d2ft_hpc.user_loop.saved import FILE, SavedFollower
from d2ft_hpc.user_loop.section import D2ftSection


class PlanFollower:
    """What `initialize` adds to a DeepSpeed engine, as `engine.d2ft`.

    Batches of which scores are measured run dense; a plan is in force from the batch after them.
    """

    def __init__(
        self,
        ours: DeepSpeedEngine | PipelineEngine,
        section: D2ftSection,
        costs: StepCosts,
        placement: Placement,
        selection: SampleSelection | None,
        control: Control,
    ) -> None:
        """On all ranks together. ours: the user's engine as our training loop has it. selection: of planner samples."""
        self.executor, self.section, self.control = ours.executor, section, control
        self.scores: Scores | None = None
        """Those of the newest plan; None where the planner reads none."""
        self.planning_seconds = 0.0
        """Time that scoring's collectives and solving took so far; the dense probe steps come on top."""
        self._ours, self._engine, self._costs, self._placement = ours, ours.engine, costs, placement
        self._selection = selection
        self.slot = 0
        """The place in its batch of the micro-batch that runs, or ran last, in training."""
        self.is_boundary = False
        """Whether an optimiser step follows it."""
        self._observer: GradientObserver | PartObserver | None = None
        self._eager = ExitStack()  # what ends when the observer does
        self._batches = 0  # begun since the newest plan was made
        self._seen = -1
        self._plans_made = 0
        if isinstance(ours, PipelineEngine):
            self._lead_batches(ours)
        else:
            # Of the engine, so that copies of its module have none, and torch.compile sees none.
            ours.engine.register_forward_pre_hook(self._before_forward)
        if ours.same_rows is not None:
            say(control, f"one plan for all replicas: {ours.same_rows}")
        self._follow_checkpoints()
        if section.plan is not None:
            self.follow(SkipPlan.load(section.plan))
        elif not self._needs_scores:
            self._make_plan(None)

    @property
    def plan(self) -> SkipPlan | None:
        """The plan in force; None while steps run dense."""
        return self.executor.plan

    def choose(self, micro_batches: Sequence[MicroBatch]) -> list[MicroBatch]:
        """Planner `samples`: of a batch, (images, labels) for each micro-batch, what is to be trained on, in as many
        micro-batches; by all ranks together, between two steps.

        Raises PlanError with another planner.
        """
        if self._selection is None or self.plan is None:
            raise PlanError(
                f'choose() draws samples for "planner": "samples"; with {self.section.planner!r} train on all of them'
            )
        share_of_all = float((self.plan.operations == Operation.FULL).mean())
        return self._selection(micro_batches, int(self._engine.global_steps), share_of_all)

    def follow(self, plan: SkipPlan) -> None:
        """Puts `plan` in force from the next batch on. Raises PlanError where this engine cannot run it."""
        self._ours.check(plan)
        self.executor.load(plan, self._placement.layout.replica)
        self._batches = 0

    def save(self, folder: str | Path) -> None:
        """Writes weights and optimiser in timm's names, plan and scores to `folder`; on all ranks together."""
        folder = Path(folder)
        self._ours.save(folder, write_file)
        if self.control.rank == 0:
            if self.plan is not None:
                self.plan.save(folder / "plan.h5")
            if self.scores is not None:
                with atomic.replaced(folder / "scores.npz") as temporary, temporary.open("wb") as file:
                    np.savez(file, forward=self.scores.forward, backward=self.scores.backward)

    def _follow_checkpoints(self) -> None:
        """The engine's `save_checkpoint` and `load_checkpoint` carry the plan, too, and all that the next ones follow
        from."""
        engine, save, load = self._engine, self._engine.save_checkpoint, self._engine.load_checkpoint

        def save_checkpoint(save_dir: Any, tag: Any = None, *args: Any, **kwargs: Any) -> Any:
            tag = f"global_step{engine.global_steps}" if tag is None else str(tag)
            content = self._saved().to_bytes()
            with agreed(self.control, "saving the plan"):
                if self.control.rank == 0:  # before DeepSpeed says that this checkpoint is the latest
                    folder = Path(save_dir) / tag
                    folder.mkdir(parents=True, exist_ok=True)
                    atomic.write(folder / FILE, content)
            return save(save_dir, tag, *args, **kwargs)

        def load_checkpoint(*args: Any, **kwargs: Any) -> Any:
            found = load(*args, **kwargs)
            asked = inspect.signature(load).bind(*args, **kwargs).arguments
            if found[0] is not None and not asked.get("load_module_only"):
                self._resume(Path(found[0]).parent / FILE)
            return found

        engine.save_checkpoint, engine.load_checkpoint = save_checkpoint, load_checkpoint

    def _saved(self) -> SavedFollower:
        """On all ranks together."""
        observed = None
        if self._observer is not None:
            own = self._observer.sums.cpu().numpy().astype("<f4")
            of_ranks = self.control.all_gather(own.tobytes())
            observed = np.stack([np.frombuffer(each, "<f4").reshape(own.shape) for each in of_ranks])
        return SavedFollower(self.plan, self._batches, self._plans_made, self.scores, observed)

    def _resume(self, path: Path) -> None:
        """Goes on from the file, if there is one; on all ranks together. A plan that the configuration names and never
        replaces stays. Raises CheckpointError where the file is damaged."""
        content = share(self.control, lambda: path.read_bytes() if path.exists() else b"", "the saved plan")
        if self.section.plan is not None and self.section.replan.every is None:
            return
        if not content:
            say(self.control, f"{path} is missing, which a checkpoint of ours has: plans begin anew")
            return
        saved = SavedFollower.from_bytes(content, str(path))
        try:
            if saved.plan is not None:
                self._ours.check(saved.plan)
        except PlanError as error:
            say(self.control, f"the checkpoint's plan does not fit, plans begin anew: {error}")
            return
        if self._observer is not None:
            self._observer.close()
            self._observer = None
            self._eager.close()
        self.executor.unload()
        if saved.plan is not None:
            self.follow(saved.plan)
        self._batches, self._plans_made, self.scores = saved.batches, saved.plans_made, saved.scores
        self._seen = -1
        if saved.observed is not None and len(saved.observed) == self.control.world_size:
            self._observe()
            assert self._observer is not None
            self._observer.sums.copy_(torch.from_numpy(saved.observed[self.control.rank].copy()))

    def overhead(self) -> str:
        """What following plans has cost so far, in words."""
        steps = max(int(self._engine.global_steps), 1)
        return (
            f"following the plan {1e6 * self.executor.lookup_seconds / steps:.0f} us a step, "
            f"planning {1e6 * self.planning_seconds / steps:.0f} us a step over {steps} steps"
        )

    @property
    def _needs_scores(self) -> bool:
        return self.section.entry.reads_scores

    def _lead_batches(self, pipeline: PipelineEngine) -> None:
        """A pipeline's batches begin with its `train_batch`."""
        train_batch = pipeline.engine.train_batch

        def planned_batch(*args: Any, **kwargs: Any) -> Any:
            self._begin_batch()
            pipeline.begin_batch()
            return train_batch(*args, **kwargs)

        pipeline.engine.train_batch = planned_batch

    def _before_forward(self, engine: nn.Module, inputs: Any) -> None:
        if not self._engine.module.training or not torch.is_grad_enabled():
            return
        # Read here and not in the blocks: torch.compile would make kernels anew for each value of DeepSpeed's counter.
        self.slot = current_slot(self._engine)
        self.is_boundary = bool(self._engine.is_gradient_accumulation_boundary())
        micro_step = int(self._engine.micro_steps)
        if micro_step != self._seen and self.slot == 0:
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
                self._observe()
            else:
                self._make_plan(None)
        self._batches += 1

    def _observe(self) -> None:
        """The steps from now on give scores; not through torch.compile, whose kernels would keep or lack the hooks."""
        self._observer = self._make_observer()
        self._eager.enter_context(torch.compiler.set_stance("force_eager"))

    def _make_observer(self) -> GradientObserver | PartObserver:
        engine, subnets = self._engine, self.executor.subnets
        slots = int(engine.gradient_accumulation_steps())
        if isinstance(self._ours, (PipelineEngine, TensorParallelEngine)):
            return PartObserver(self._ours.part, subnets, self._placement, slots, lambda: loss_scale(engine))
        return GradientObserver(engine.module, subnets, slots, lambda: self.slot, lambda: loss_scale(engine))

    def _make_plan(self, observer: GradientObserver | PartObserver | None) -> None:
        start = time.perf_counter()
        self.scores = None if observer is None else self._collect_scores(observer)
        self._observer = None
        self._eager.close()
        plan = SkipPlan.from_bytes(share(self.control, lambda: self._solve().to_bytes(), "the plan"))
        self._plans_made += 1
        self.follow(plan)
        seconds = time.perf_counter() - start
        self.planning_seconds += seconds
        say(
            self.control,
            f"plan {plan.hash[:12]} ({plan.evidence}): "
            f"{self._costs.planned_share(plan):.1%} of the dense compute, made in {seconds:.2f} s",
        )

    def _solve(self) -> SkipPlan:
        section, layout = self.section, self._placement.layout
        slots = int(self._engine.gradient_accumulation_steps())
        num_blocks, num_heads = self.executor.subnets.shape
        if section.entry.binding == "sample":
            return plan_samples(
                samples=slots * int(self._engine.train_micro_batch_size_per_gpu()),
                slots=slots,
                replicas=layout.replicas,
                num_blocks=num_blocks,
                num_heads=num_heads,
                compute_budget=section.compute_budget,
                score_cost=self._costs.score_flops / self._costs.dense_flops,
            )
        speed = section.device_speed
        return solve_slots(
            section,
            self.scores,
            slots=slots,
            replicas=layout.replicas,
            subnets=(num_blocks, num_heads),
            forward_cost=self._costs.forward_share,
            always_share=self._costs.always_share,
            trains=self._costs.trains,
            device_speed=None if speed is None else by_device(speed, layout),
            replicas_meet=self._engine.zero_optimization_stage() == 3,
            seed=(section.seed, self._plans_made),
            same_rows=self._ours.same_rows is not None,
            placement=self._placement if layout.is_cut else None,
        )

    def _collect_scores(self, observer: GradientObserver | PartObserver) -> Scores:
        observer.close()
        fisher = self._rows_of_all(observer.sums / self.section.probe_batches)
        names = (self.section.forward_score, self.section.backward_score)
        if self.section.backward_score == "fisher":
            return Scores(fisher, fisher, 0.0, *names, 0)
        with self._ours.full_model() as model:
            magnitude = weight_magnitude(model, self.executor.subnets).cpu().numpy()
        return Scores(fisher, np.broadcast_to(magnitude, fisher.shape), 0.0, *names, 0)

    def _rows_of_all(self, own: Tensor) -> np.ndarray:
        """[row, block, head] of all replicas from each rank's own subnets [slot, block, head]."""
        layout = self._placement.layout
        of_slots = own.cpu().numpy().astype("<f4")
        of_ranks = [
            np.frombuffer(part, "<f4").reshape(of_slots.shape)
            for part in self.control.all_gather(of_slots.tobytes())
        ]
        of_replicas: np.ndarray = np.zeros((layout.replicas, *of_slots.shape), "<f4")
        for rank, of_rank in enumerate(of_ranks):
            of_replicas[replace(layout, rank=rank).replica] += of_rank
        rows: np.ndarray = of_replicas.swapaxes(0, 1).reshape(-1, *of_slots.shape[1:])
        return rows


def say(control: Control, text: str) -> None:
    """A line for the user, from rank 0."""
    if control.rank == 0:
        print(f"d2ft: {text}", flush=True)
