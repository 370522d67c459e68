"""`d2ft_hpc.attach`: plans in a training loop of the user's own, over plain torch, DDP or FSDP2."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import astuple, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from d2ft_hpc.engines.check import check_plan, check_recompute
from d2ft_hpc.engines.engine import evaluated
from d2ft_hpc.engines.gradient_norm import total_norm
from d2ft_hpc.engines.planned_bytes import PlannedBytes
from d2ft_hpc.errors import CheckpointError, ConfigError, PlanError, UnsupportedModelError
from d2ft_hpc.execution.gradients import Reduction, in_backward
from d2ft_hpc.families.table import backbone_of
from d2ft_hpc.lifecycle import PlanContext, PlanController, PlanState
from d2ft_hpc.lifecycle.foresight import trial_plan
from d2ft_hpc.lifecycle.observed_scores import ObservedScores
from d2ft_hpc.model.subnets import ParameterClass
from d2ft_hpc.parallel.rank_layout import Placement
from d2ft_hpc.planning import SkipPlan
from d2ft_hpc.planning.communication_volume import DataParallel
from d2ft_hpc.planning.samples import SampleOptions
from d2ft_hpc.planning.tokens import TOKENS
from d2ft_hpc.scores.gradient_observer import GradientObserver
from d2ft_hpc.selection import SampleSelection
from d2ft_hpc.selection.build import count_scoring, selection_of
from d2ft_hpc.user_loop.attached import (
    attached,
    loop_context,
    observe_again_if_incomplete,
    resume,
    tell_if_resumed_without_plan,
    tell_if_too_long,
    tell_if_too_short,
    tell_of_dead_classifier,
    tell_of_graphs,
)
from d2ft_hpc.user_loop.batch_counter import BatchCounter, ComputeSoFar, samples_in
from d2ft_hpc.user_loop.choosing import choose_from
from d2ft_hpc.user_loop.default_group import control_of_loop
from d2ft_hpc.user_loop.model_hooks import ModelHook, watch_optimizers
from d2ft_hpc.user_loop.pass_watch import PassWatch
from d2ft_hpc.user_loop.plan_printer import PlanPrinter, compute_in_words
from d2ft_hpc.user_loop.prepare import bind_engine
from d2ft_hpc.user_loop.record import LoopRecord
from d2ft_hpc.user_loop.section import D2ftSection, parse_section, require_length, require_options_for
from d2ft_hpc.user_loop.settings_kept import check_planner, settings_to_keep

_MANY_SAMPLES = 1024
"""Of a micro-batch, whose size is not known before it comes: a budget that leaves nothing of so many is too small."""
_USUAL_STEPS = 5
"""Steps that came after equally many forwards, from which on these are the loop's habit."""
_TRAIN = "call model.train() before the loop (from_pretrained gives models that evaluate)"


def attach(
    model: Any,
    compute_budget: float = 0.6,
    *,
    planner: str = TOKENS.name,
    total_steps: int | None = None,
    micro_batches: int = 1,
    **settings: Any,
) -> PlannedLoop:
    """Lets a model of a known family train under plans in the loop that follows.

    It may be inside peft's wrapper or a module of the user's own, which trains as before; shares of compute are of the
    model of the known family alone, with the head that its library has put around it.

    Call it before DDP or `fully_shard` get the model: it freezes what lies below the blocks.

    compute_budget: share of the dense training FLOPs. planner: `tokens`, which keeps dense training's accuracy, scales
        the images that the model gets in training: small ones at first, full size (the model's `img_size`, which they
        must have) at the end of `total_steps` steps of the optimiser, which it has to know. `samples` scores what
        `PlannedLoop.choose` is given and draws what trains; any other one plans by heads, and the first
        batches run dense and give the scores. Models that read text need `samples` or one by heads ("joint").
        micro_batches: those of a rank whose gradients make one step of the optimiser. settings: other keys of the
        "d2ft" section (`D2ftSection`), such as `embeddings`, `compile`, `cuda_graphs`, `replan={"every": "100 steps"}`,
        `file`, a saved plan, or `results="runs/mine"`, a folder for `results.h5`, which `d2ft-hpc report runs/mine`
        reads.

    Raises ConfigError for settings that cannot be, PlanError where no plan keeps the budget, UnsupportedModelError
    where the model cannot be cut by head.
    """
    if micro_batches < 1:
        raise ConfigError(f"micro_batches={micro_batches}: a batch has at least one")
    given = {"compute_budget": compute_budget, "planner": planner, "total_steps": total_steps, **settings}
    return PlannedLoop(model, parse_section(given, ""), micro_batches)


class PlannedLoop:
    """A model of the user's loop with its plan and all that the next ones follow from.

    A batch ends with a step of the optimiser, each forward in training mode is its next micro-batch. On several ranks
    each is a replica that follows rows of its own; all come to the same batches.
    """

    same_rows: str | None = None

    def __init__(self, model: nn.Module, section: D2ftSection, micro_batches: int) -> None:
        self.section, self.slots = section, micro_batches
        if not isinstance(model, nn.Module):
            raise UnsupportedModelError(
                f"model is a {type(model).__name__}: give one of timm or transformers"
            )
        self._whole = model
        self._model = model = backbone_of(model)
        """The supported model that the user's own is, or has inside."""
        require_options_for(model, section, "")
        require_length(section, "")
        self.executor, sample_shape, self._costs = attached(model, self._whole, section)
        self._sample_shape = sample_shape
        self._selection: SampleSelection | None = None
        if section.entry.binding == "sample":
            device = next(model.parameters()).device
            score_flops = count_scoring(self._new_selection(0), sample_shape, device)
            self._costs = replace(self._costs, score_flops=score_flops)
        self._in_blocks, self._trained_in_blocks = self._parameters_in_blocks(), self._trained_parameters()
        self._controller: PlanController | None = None
        self._restored: PlanState | None = None
        self._slot = -1  # of the micro-batch that runs, or ran last; -1 between batches
        self._steps = self._draws = self._saved_steps = 0
        self._is_resumed = False
        self._is_planned = False  # the batch that runs, or comes
        self._is_chosen = self._is_bound = False
        self._unseen_steps = self._foreign_steps = 0
        self._has_stepped = False
        self._is_begun = False  # a batch, as opposed to what a loop does between two
        self._made_steps = 0  # of the optimiser, here
        self._passes = 0  # forwards whose gradients its next one gets
        self._forwards = self._usual_forwards = 0  # all that came since the last step, and before it
        self._usual_steps = 0  # in succession after so many
        self._had_too_many_passes = self._has_told_of_passes = False
        self._has_told_of_changes = False
        self._data_parallel: DataParallel | None = None
        self._planned_bytes: PlannedBytes | None = None
        self._foresee()
        self._watched = PassWatch()
        self._counter = BatchCounter(self._costs, self.executor, sample_shape)
        settings = {**section.model_dump(mode="json"), "micro_batches": micro_batches}
        self.record = LoopRecord(section.results, settings, model, self.executor.subnets, self._costs)
        """What the loop can add to its `results.h5`: `record.loss`, `record.evaluation`, `record.close`."""
        self.executor.bind(self.current_slot, Reduction.AFTER_BACKWARD)
        self._source = ObservedScores(
            section,
            self.executor.subnets,
            lambda: (self._plans().control, self._plans().context.placement.layout),
            self._observer,
            lambda: nullcontext(model),
        )
        self._watch()
        if isinstance(self._whole, DistributedDataParallel):
            self.bind(self._whole)  # which it is too late for, if attach has frozen something

    def choose(self, samples: Any, labels: Tensor | None = None) -> Any:
        """For planner `samples`: the samples of a micro-batch that are to be trained on, with all that belongs to them,
        as they were given; all ranks call it together.

        samples: images [sample, channel, height, width] and labels, int64 [sample] or probabilities [sample, class].
        For models that read text: a mapping such as a collator of transformers gives, in which everything is
        [sequence, token, ...] and `labels` are int64, -100 where nothing is to be learnt; the result is a dict. Or
        input_ids and labels as two tensors.

        Raises PlanError with another planner, in evaluation mode, for what it cannot draw from, or where the budget
        leaves not one sample.
        """
        given = samples if labels is None else (samples, labels)
        try:
            (chosen,) = choose_from([given], self.section, self._counter, self._begin_draw)
        except torch.OutOfMemoryError:
            self._watched.drop_choice()
            raise
        self._draws += 1
        self._is_chosen = True
        return chosen

    def _begin_draw(self, samples: int) -> tuple[SampleSelection, int]:
        self._drop_what_broke_off()
        if not self._model.training:
            name = type(self._model).__name__
            raise PlanError(f"choose() draws what trains, but {name} is in evaluation mode: {_TRAIN}")
        self._plan_batch(samples)
        if self._selection is None:
            self._selection = self._new_selection(self._plans().control.rank)
        self._is_begun = True
        self._turn_to("forward")
        return self._selection, self._draws

    @property
    def plan(self) -> SkipPlan | None:
        """The plan in force; None while batches run dense."""
        return self.executor.plan if self._restored is None else self._restored.plan

    @property
    def promised_share(self) -> float | None:
        """The share of the dense compute that the plan in force gives this rank; None without a plan."""
        return self._counter.promised_share(self._plans().context.placement)

    @property
    def measured_share(self) -> float | None:
        """The share of the dense compute that this rank computed in the first batch under the plan in force; None
        before that batch."""
        return self._counter.measured_share

    def report(self) -> str:
        """Two lines of this rank: what the plan in force and all steps so far promised and computed, of dense ones."""
        return compute_in_words(self._counter, self._plans().context, self._steps)

    def activate(self, plan: SkipPlan) -> None:
        """Puts a plan of the user's own in force from the next batch on; images that grow go on growing.

        Raises PlanError where it cannot be run.
        """
        self._restore(PlanState(plan, batches=1, plans_made=self._plans().plans_made + 1))

    def state_dict(self) -> dict[str, Any]:
        """The state of plan and replanning between two batches. Ranks need not exchange anything for it, and it is the
        same on all of them, except for the compute that each has done."""
        state = self._restored
        if state is None:
            state = PlanState() if self._controller is None else self._controller.state()
        settings = settings_to_keep(self.section)
        state = replace(state, compute=astuple(self._counter.so_far), settings=settings)
        self._saved_steps = self._steps
        return {
            "plans": base64.b64encode(state.to_bytes()).decode(),
            "steps": self._steps,
            "draws": self._draws,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on, from the next batch on, as the loop whose `state_dict` this was. Raises CheckpointError if it is
        damaged, no such state, or of another planner. The next batch raises PlanError where its plan does not fit the
        model or the number of ranks.
        """
        try:
            content = base64.b64decode(state["plans"], validate=True)
            steps, draws = int(state["steps"]), int(state["draws"])
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"d2ft.load_state_dict: not what state_dict() gave ({error!r})") from None
        restored = PlanState.from_bytes(content, "d2ft.load_state_dict")
        check_planner(restored.settings, self.section, "d2ft.load_state_dict", "attach")
        self._restored, self._is_resumed = restored, True
        self._steps, self._draws, self._saved_steps = steps, draws, steps
        self._counter.so_far = ComputeSoFar(*self._restored.compute)
        self._slot, self._is_planned = -1, False

    def current_slot(self) -> int:
        """The place in its batch of the micro-batch that runs, or ran last."""
        return max(self._slot, 0)

    def bind(self, model: nn.Module) -> str:
        """Fits plans to what was made of the attached model, and returns what that is; the first training forward does
        so by itself. Raises ConfigError where plans could not be run exactly."""
        found, self._data_parallel = bind_engine(model, self.executor, self.current_slot)
        self._is_bound = True
        if self._controller is not None:
            self._controller.context = replace(self._controller.context, replicas_meet=self._is_spread)
            if self.executor.plan is not None:
                self.executor.activate(self.executor.plan, self._controller.control.rank)
        return found

    def check(self, plan: SkipPlan) -> None:
        """Raises PlanError where the loop cannot run `plan`, ConfigError where recomputing blocks lose gradients."""
        check_recompute(self._model)
        check_plan(plan, slots=self.slots, replicas=self._plans().control.world_size)

    def _watch(self) -> None:
        """From now on forwards of the model and steps of optimisers reach the methods that follow."""
        model: nn.Module = self._model
        whole: Any = self._whole
        if (
            whole.get_base_model() if hasattr(whole, "get_base_model") else whole
        ) is not model:  # peft's wrapper
            # The user's module computes more and calls parts of the model in any order, but images always reach its
            # first module.
            model = self.executor.subnets.family.embedding(model) or model
        before = ModelHook(model, self._model, self._before_forward, self._before_evaluation)
        model.register_forward_pre_hook(before, with_kwargs=True)
        for ends in {self._model, self._whole}:  # the one alone may be called, or parts of it by the other
            after = ModelHook(ends, self._model, self._after_forward, self._after_evaluation)
            ends.register_forward_hook(after, with_kwargs=True, always_call=True)
        watch_optimizers(self._whole, self, self._before_optimizer, self._after_optimizer)

    def _before_forward(self, inputs: Sequence[Any]) -> None:
        """Called before the model's forward in training mode: the next micro-batch begins."""
        self.executor.forward_trains, self._watched.is_in_forward = True, False
        self._drop_what_broke_off()
        if self.section.entry.binding == "sample" and not self._is_chosen:
            takes_images = self.executor.subnets.family.takes_images
            names = "images, labels" if takes_images else "batch"
            raise PlanError(
                f"planner='samples' draws what a micro-batch trains on: call `{names} = d2ft.choose({names})` before "
                f"the model, or attach(model, planner=...) another one"
            )
        if self._slot >= self.slots - 1:
            self._require_own_optimizer()
            if not self._goes_on():
                self._end_batch()  # the optimiser left a step out
        if not self._is_bound:
            ddp: Any = DistributedDataParallel._active_ddp_module
            is_ddp = ddp is not None and any(each is self._model for each in ddp.module.modules())
            self.bind(ddp if is_ddp else self._whole)
        self._plan_batch()
        self._slot = (self._slot + 1) % self.slots
        self._is_chosen, self._is_begun = False, True
        self._passes, self._forwards = self._passes + 1, self._forwards + 1
        self._watched.begin_pass()
        self._turn_to("forward")
        samples = samples_in(inputs)
        self._counter.train(self._slot, len(samples), samples)

    def _after_forward(self, outputs: Sequence[Any]) -> None:
        self.executor.forward_trains = False
        self._watched.end_forward(outputs[0])
        if self._watched.broke_off:
            return
        self._counter.end_forward()
        self._turn_to("backward")

    def _drop_what_broke_off(self) -> None:
        """A pass raised and the loop goes on, as with fewer samples where memory ran out: its micro-batch is run again,
        or the whole batch where the loop cleared the gradients."""
        if not self._watched.broke_off:
            return
        if self._has_gradients():
            self._counter.drop_last()
            self._watched.drop()
            self._slot, self._passes = self._slot - 1, self._passes - 1
        else:
            self._counter.drop_batch()
            self._watched.begin_batch()
            self._watched.forget()
            self.record.drop_batch()
            self._slot, self._passes = -1, 0
        if self._source.is_observing:
            self._source.stop()
            self._source.measure()

    def _before_evaluation(self, inputs: Sequence[Any]) -> None:
        self.executor.forward_trains = False
        self._counter.begin_evaluation()
        if not self._is_begun:
            self.record.pause()

    def _after_evaluation(self, inputs: Sequence[Any]) -> None:
        self._counter.end_evaluation()

    def _turn_to(self, phase: str) -> None:
        if self.record.is_on:
            self.record.turn_to(phase, self._plans(), self._device, self._steps)

    @property
    def _device(self) -> torch.device:
        return next(self._model.parameters()).device

    def _plan_batch(self, samples: int = 1) -> None:
        """Puts the plan of the coming batch in force; all ranks call it together. samples: of a micro-batch."""
        plans = self._plans()
        plans.context = replace(plans.context, micro_batch_size=samples) if samples > 1 else plans.context
        if self._restored is not None:
            self._restore(self._restored)
            self._restored = None
        if not self._is_planned:
            if not self._has_told_of_changes and (changed := self._changed_since_attach()):
                plans.listener.say(f"{changed}: from here on, shares of compute are not those that are told")
                self._has_told_of_changes = True
            plans.before_batch(self._steps)
            self._is_planned = True

    def _restore(self, state: PlanState) -> None:
        """The plan's resolution becomes that of the coming batch."""
        resume(self._plans(), state, self._steps)
        self._is_planned = state.plan is not None

    def _end_batch(self, learning_rate: float = math.nan) -> None:
        """learning_rate: NaN: the optimiser makes no step."""
        seen = self._counter.passes
        plans = self._plans()
        if not self._has_told_of_passes:
            tell_if_too_long(plans, self._steps)
        work = self._counter.end(
            plans.context.placement, self._source.flops_of_batch, is_whole=self._watched.is_whole
        )
        self._watched.begin_batch()
        self.record.end_batch(
            self._steps,
            work,
            plans,
            learning_rate,
            self._foreseen_bytes(),
            recomputes=self._counter.recomputes,
        )
        self._slot, self._is_planned, self._is_begun = -1, False, False
        self._steps += 1
        fix = f"attach(..., micro_batches={seen})"
        observe_again_if_incomplete(plans, self._source, seen, fix)
        if plans.context.curve is None or self._steps != plans.context.total_steps:  # which may be the end
            self._plan_batch()  # now, so that a checkpoint has it
        self._turn_to("data")

    def _before_optimizer(self, is_own: bool) -> None:
        # Nobody sees where the forward of a module ends that calls parts of the model.
        self.executor.forward_trains = False
        if not is_own:
            self._foreign_steps += self._slot >= 0
            return
        self._has_stepped = True
        if self._slot < 0:  # a second optimiser's, or one that makes its state for a checkpoint
            self._unseen_steps += self._steps == 0
            if self._unseen_steps > 1:
                name = type(self._model).__name__
                fix = (
                    "call it (not its forward or forward_features), or attach the module that does"
                    if self._model.training
                    else _TRAIN
                )
                raise PlanError(
                    f"the optimiser steps, but {name} was not called in training mode, so that no plan is followed: "
                    f"{fix}"
                )
            return
        if in_backward():
            raise PlanError(
                "the optimiser steps while the backward pass still runs (in a hook of a parameter), but a batch of "
                "plans ends with the first step, before all gradients are there: step after loss.backward()"
            )
        self._counter.stop()
        if self.record.is_on:
            self.record.gradient_norm(self._gradient_norm())
        self._turn_to("optimizer")

    def _after_optimizer(self, optimizer: Optimizer) -> None:
        if self._slot >= 0:
            self._check_passes(optimizer)
            self._end_batch(float(optimizer.param_groups[0]["lr"]))
            self._watched.forget()

    def _goes_on(self) -> bool:
        """Whether a forward after the last one of a batch belongs to the same step, as where an epoch ended amidst it.
        Gradients tell, but not before a first step, which not every optimiser shows: they are infinite or cleared where
        a loss scale left a step out."""
        if self._has_gradients():
            return self._made_steps > 0
        self._passes = self._watched.awaited  # those may wait for one backward together with what comes
        return False

    def _has_gradients(self) -> bool:
        norm = self._gradient_norm()
        return norm is not None and 0 < float(norm) < math.inf

    def _gradient_norm(self) -> Tensor | None:
        """Of the whole model, on all ranks together; None while there are no gradients."""
        gradients = [each.grad for each in self._whole.parameters() if each.grad is not None]
        return total_norm(gradients) if gradients else None

    def _check_passes(self, optimizer: Optimizer) -> None:
        """As the optimiser steps. Raises ConfigError at its first step where more forwards came than `micro_batches`;
        says so later on, at the second such step in succession: one may follow an epoch that ended amidst a batch.
        Forwards whose gradients do not reach the step are told where always as many come, since a loss scale leaves
        steps out now and then."""
        if not (self._made_steps or self._is_resumed):
            tell_if_resumed_without_plan(self._plans(), optimizer, self._whole)
        passes, forwards = self._passes - self._watched.awaited, self._forwards
        has_too_many = passes > self.slots
        self._usual_steps = self._usual_steps + 1 if forwards == self._usual_forwards else 1
        told = (
            f"micro_batches={self.slots}, but {{}} forward passes came before optimizer.step(), so that steps are "
            f"miscounted: attach(..., micro_batches={{}})"
        )
        if has_too_many and not (self._made_steps or self._has_told_of_passes):
            raise ConfigError(told.format(passes, passes))
        if forwards > self.slots and self._usual_steps == _USUAL_STEPS:
            has_too_many = self._had_too_many_passes = True
            passes = forwards
            told += ", or call the model under torch.no_grad() where it does not train"
        if has_too_many and self._had_too_many_passes and not self._has_told_of_passes:
            self._plans().listener.say(told.format(passes, passes))
            self._has_told_of_passes = True
        self._had_too_many_passes, self._usual_forwards = has_too_many, forwards
        self._passes, self._forwards, self._made_steps = 0, 0, self._made_steps + 1

    def _require_own_optimizer(self) -> None:
        """Raises PlanError where optimisers step, but so far none that has parameters of the model."""
        if not self._has_stepped and self._foreign_steps > 1:
            name = type(self._model).__name__
            raise PlanError(
                f"the optimiser steps, but holds none of the parameters of {name}, which does not train: make it after "
                f"what replaces them (fully_shard, load_state_dict(assign=True), to_empty)"
            )

    def _position(self) -> tuple[int, int]:
        return self._steps, self._saved_steps

    def _plans(self) -> PlanController:
        """Made when first needed, after the ranks have met; all of them call it together."""
        if self._controller is None:
            control = control_of_loop()
            ranks = control.world_size
            if self._parameters_in_blocks() != self._in_blocks:
                raise ConfigError(
                    "the model's blocks got other parameters after d2ft_hpc.attach(model), as from peft: call "
                    "get_peft_model, or what else changes blocks, before attach"
                )
            if changed := self._changed_since_attach():
                raise ConfigError(f"{changed}: do so before d2ft_hpc.attach(model)")
            if freed := self._freed_below_blocks():
                raise ConfigError(
                    f"{freed} was freed after attach, which freezes what lies below the blocks: "
                    f"attach(model, embeddings='trained'), or 'complete_path'"
                )
            context = self._context(self.section, ranks, control.rank)
            self._controller = PlanController(context, self, control, self._source, PlanPrinter(control))
            tell_if_too_short(self._controller, self._position)
            tell_of_graphs(self._controller, self._device)
            tell_of_dead_classifier(self._controller, self._whole)
        return self._controller

    def _changed_since_attach(self) -> str:
        """What was done to blocks, as the beginning of a sentence; empty if nothing was."""
        before, now = self._trained_in_blocks, self._trained_parameters()
        blocks = [index for index, trained in now.items() if trained != before[index]]
        parts = "" if any(now[index] == 0 or before[index] == 0 for index in blocks) else "parts of "
        return (
            f"{parts}blocks {blocks} were frozen, or freed, after attach had counted what they cost"
            if blocks
            else ""
        )

    def _trained_parameters(self) -> dict[int, int]:
        """How many train in each block."""
        return {
            index: sum(parameter.requires_grad for parameter in block.parameters())
            for index, block in self.executor.blocks.items()
        }

    def _freed_below_blocks(self) -> str:
        """The name of a parameter below the blocks that trains though `attach` froze it; empty if none does."""
        if self.section.embeddings != "frozen":
            return ""
        trained = (name for name, parameter in self._model.named_parameters() if parameter.requires_grad)
        classify = self.executor.subnets.classify
        return next((name for name in trained if classify(name) is ParameterClass.EMBEDDING), "")

    def _parameters_in_blocks(self) -> int:
        return sum(1 for block in self.executor.blocks.values() for _ in block.parameters())

    def _context(self, section: D2ftSection, ranks: int, rank: int) -> PlanContext:
        return loop_context(
            section,
            self._costs,
            Placement.whole(ranks, rank, *self.executor.subnets.shape),
            slots=1 if section.entry.binding == "sample" else self.slots,
            micro_batch_size=1,
            replicas_meet=self._is_spread,
            where="",
        )

    def _foresee(self) -> None:
        """Raises PlanError where no plan of this loop keeps the budgets, as far as one rank by itself can tell."""
        context = self._context(self.section.model_copy(update={"device_speed": None}), 1, 0)
        if self.section.file is not None:
            SkipPlan.read(self.section.file)  # or it is refused
        else:
            trial_plan(replace(context, micro_batch_size=_MANY_SAMPLES))

    def _foreseen_bytes(self) -> PlannedBytes | None:
        if self._planned_bytes is None and self._data_parallel is not None and self.record.is_on:
            self._planned_bytes = PlannedBytes(
                self._model,
                self.executor,
                self._plans().context,
                precision="fp32" if next(self._model.parameters()).dtype is torch.float32 else "bf16",
                data_parallel=self._data_parallel,
                around=self._whole,
            )
        return self._planned_bytes

    def _observer(self) -> GradientObserver:
        return GradientObserver(
            self._model, self.executor.subnets, self.slots, self.current_slot, lambda: 1.0
        )

    def _new_selection(self, replica: int) -> SampleSelection:
        assert isinstance(self.section.options, SampleOptions)
        selection = selection_of(
            self.section.options, self._model, self._sample_shape, seed=self.section.seed, replica=replica
        )
        selection.scorer.bind(partial(evaluated, self._whole))
        return selection

    @property
    def _is_spread(self) -> bool:
        return isinstance(self._whole, FSDPModule) or isinstance(self._model, FSDPModule)
