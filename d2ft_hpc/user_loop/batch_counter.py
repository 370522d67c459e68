"""Counts what a batch of a user's loop computes on this rank, beside what its plan promises and what a dense batch
would compute."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import repeat
from typing import Any, ClassVar

import torch
from torch import Tensor

from d2ft_hpc.errors import PlanError
from d2ft_hpc.execution.compilation import keep_mode_after_compiled_call
from d2ft_hpc.execution.executor import PlanExecutor
from d2ft_hpc.execution.gradients import in_backward
from d2ft_hpc.metering import Metered, StepCosts
from d2ft_hpc.metering.flops import RankWork
from d2ft_hpc.metering.meter import OperatorCounter
from d2ft_hpc.parallel.rank_layout import Placement
from d2ft_hpc.planning import SkipPlan


@dataclass(frozen=True)
class BatchWork(RankWork):
    """A batch of this rank, by columns of the results' steps. executed_flops, bytes_sent: NaN where no batch under its
    plan was counted."""

    rank_samples: int
    dense_flops: float
    executed_flops: float
    bytes_sent: float


@dataclass(frozen=True)
class ComputeSoFar:
    """Training FLOPs of this rank over its batches: of dense ones, of what plans promised, of what was executed, and
    what the scores of heads took beside them."""

    dense_flops: float = 0.0
    planned_flops: float = 0.0
    executed_flops: float = 0.0
    score_flops: float = 0.0

    def and_then(self, work: BatchWork, score_flops: float) -> ComputeSoFar:
        """With one batch more; one whose operators nobody counted is left out."""
        if math.isnan(work.executed_flops):
            return self
        return ComputeSoFar(
            self.dense_flops + work.dense_flops,
            self.planned_flops + work.planned_flops,
            self.executed_flops + work.executed_flops,
            self.score_flops + score_flops,
        )


@dataclass(frozen=True)
class _Counted:
    plan: SkipPlan | None
    metered: Metered
    planned_flops: float
    dense_flops: float


class BatchCounter:
    """Counts the first batch under every plan; later ones run the same operators on other samples, so that theirs are
    the counted ones times their share of what is planned.

    Counting begins with a batch's first computation and goes on until `stop`: the loop's own lines need no change.
    What else it computes meanwhile counts too, unless it comes after a forward and takes no gradient, as a teacher's
    layers.
    """

    _counting: ClassVar[BatchCounter | None] = None
    """The counter of this process that counts now. It is referenced here, so that the garbage collector does not
    decide when it ends."""

    def __init__(self, costs: StepCosts, executor: PlanExecutor, sample_shape: tuple[int, ...]) -> None:
        """costs: of this rank's part of the model, for a sample of this shape."""
        self.end_others()
        self._sample_shape = sample_shape
        self._costs, self.executor = costs, executor
        self._modes: list[Any] = []
        self._metered: Metered | None = None  # of the batch that runs
        self._before_evaluation: Metered | None = None
        self._is_scoring = self._has_run_forward = self._has_run_backward = False
        self._was_whole = True  # the batch before
        self._is_disturbed = False  # another loop's batch runs at the same time, so that neither is counted
        self._counted: _Counted | None = None
        self._scored: list[tuple[int, float]] = []
        self._trained: list[tuple[int, int, float]] = []
        self.so_far = ComputeSoFar()

    @property
    def measured_share(self) -> float | None:
        """The share of the dense compute that the batch counted under the plan in force had; None if no batch was
        counted."""
        counted = self._counted
        if counted is None or counted.plan is not self.executor.plan:
            return None
        return counted.metered.flops / counted.dense_flops

    @property
    def recomputes(self) -> bool:
        """Whether what was measured last has activations that were computed once more, in the backward."""
        return self._counted is not None and self._counted.metered.recomputes

    def promised_share(self, placement: Placement) -> float | None:
        """Of the dense compute of this rank, what the plan in force lets it do; None without a plan."""
        plan, costs = self.executor.plan, self._costs
        if plan is None:
            return None
        if plan.binding == "sample":
            return costs.planned_share(plan)
        slots = range(plan.slots)
        work = costs.work(plan, placement.layout.replica, placement.own, slots, [1.0] * plan.slots)
        return work.planned_flops / (plan.slots * costs.dense_flops)

    @contextmanager
    def score(self, micro_batches: Iterable[Tensor]) -> Iterator[None]:
        """Inside, the samples of these micro-batches are scored, by evaluating them; some of them will train."""
        self.begin()
        scored = [(len(samples), self._size_of(samples)) for samples in micro_batches]
        self._is_scoring = True
        try:
            yield
            self._scored += scored
        finally:
            self._is_scoring = False

    def train(self, slot: int, samples: int, like: Tensor | None = None) -> None:
        """This many samples are about to train, in this place of the batch. like: samples of their size; None: they
        have the size whose FLOPs were counted."""
        self.begin()
        self._has_run_forward = False
        self._trained.append((slot, samples, 1.0 if like is None else self._size_of(like)))

    def end_forward(self) -> None:
        """The forward is done of which `train` was told."""
        self._has_run_forward = True

    def _counts_flops(self) -> bool:
        if in_backward():
            self._has_run_backward = True
            return True
        # Inside a forward, functions of autograd's compute without gradients, too.
        return self._is_scoring or not self._has_run_forward or torch.is_grad_enabled()

    def _size_of(self, samples: Tensor) -> float:
        """The dense FLOPs of each of these samples, in units of those that were counted of one."""
        return self._costs.relative(self.executor.subnets.family.size_of(samples, self._sample_shape))

    def begin(self) -> None:
        """Counts from here on, in the first batch under its plan."""
        is_known = self._counted is not None and self._counted.plan is self.executor.plan
        if self._is_disturbed:
            return
        if BatchCounter._counting is not self and (self._metered is not None or not is_known):
            if (other := BatchCounter._counting) is not None:
                # A second model in one loop: nobody can tell whose backward an operator is of.
                self._is_disturbed = other._is_disturbed = True
                self.end_others()
                return
            self._metered = self._metered or Metered()
            # Not through torch.compile, whose functions hide their operators, and stay eager once they met the counter.
            counter = OperatorCounter(self._metered, self._counts_flops)
            self._modes = [torch.compiler.set_stance("force_eager"), counter]
            for mode in self._modes:
                mode.__enter__()
            keep_mode_after_compiled_call()
            BatchCounter._counting = self

    @contextmanager
    def optimizer_step(self) -> Iterator[None]:
        """Around the optimiser's step: what ranks send in it, such as ZeRO's weights, belongs to the batch; what the
        step computes does not belong to the batch's passes."""
        metered = self._metered
        flops = 0 if metered is None else metered.flops
        yield
        if metered is not None:
            metered.flops = flops

    def begin_evaluation(self) -> None:
        """What the model computes until `end_evaluation` is no training, also between a batch's micro-batches."""
        metered = None if self._is_scoring else self._metered
        self._before_evaluation = metered and replace(metered, bytes_sent=dict(metered.bytes_sent))

    def end_evaluation(self) -> None:
        if self._metered is not None and self._before_evaluation is not None:
            vars(self._metered).update(vars(self._before_evaluation))
        self._before_evaluation = None

    @staticmethod
    def end_others() -> None:
        """Stops the counting of other loops: of one that an error ended in such a batch, or of a second model."""
        other = BatchCounter._counting
        if other is not None:
            other.stop()
            other._metered = None

    def stop(self) -> None:
        """What follows does not belong to the batch's passes, unless another forward comes, as inside an optimiser's
        step with a closure."""
        if BatchCounter._counting is self:
            for mode in reversed(self._modes):
                mode.__exit__(None, None, None)
            BatchCounter._counting = None

    @property
    def passes(self) -> int:
        """Micro-batches of the batch that runs."""
        return len(self._trained)

    def drop_last(self) -> None:
        """The last micro-batch that was told of broke off and will be run again."""
        self._trained.pop()
        del self._scored[len(self._trained) :]

    def drop_batch(self) -> None:
        """The batch broke off and begins anew."""
        self.stop()
        self._metered, self._scored, self._trained = None, [], []
        self._is_disturbed = self._has_run_backward = False

    def end(self, placement: Placement, score_flops: int, *, is_whole: bool = True) -> BatchWork:
        """The batch is done, under the plan that is still in force. score_flops: what was computed in it to give heads
        scores, which is no training. is_whole: every micro-batch had its backward, as far as is known; a batch of which
        one lacks it says nothing of later ones, unless the batch before lacked it, too."""
        self.stop()
        plan, costs = self.executor.plan, self._costs
        slots = [slot for slot, _, _ in self._trained]
        sizes = [samples * size for _, samples, size in self._trained]
        trained = sum(samples for _, samples, _ in self._trained)
        samples = sum(samples for samples, _ in self._scored) or trained
        scored_sizes = [samples * size for samples, size in self._scored]
        if plan is None or plan.binding == "sample":
            planned = sum(scored_sizes) * costs.score_flops + sum(sizes) * costs.dense_flops
            work = RankWork(planned, trained, 0, samples - trained)
        else:
            work = costs.work(plan, placement.layout.replica, placement.own, slots, sizes)
        dense = costs.dense_flops * sum(scored_sizes or sizes)
        counted = self._counted
        if self._metered is not None and samples:
            self._metered.flops -= score_flops
            counted = _Counted(plan, self._metered, work.planned_flops, dense)
            is_usual = self._has_run_backward and (is_whole or not self._was_whole)
            self._counted = counted if is_usual else self._counted
        self._was_whole = is_whole
        self._metered, self._scored, self._trained = None, [], []
        self._is_disturbed = self._has_run_backward = False
        executed = sent = math.nan
        if counted is not None and counted.plan is plan:
            executed = counted.metered.flops * work.planned_flops / counted.planned_flops
            sent = float(sum(counted.metered.bytes_sent.values()))
        done = BatchWork(
            **vars(work),
            # Ranks that share a replica's samples count them once.
            rank_samples=samples if placement.layout.leads_replica else 0,
            dense_flops=dense,
            executed_flops=executed,
            bytes_sent=sent,
        )
        self.so_far = self.so_far.and_then(done, score_flops)
        return done


def samples_in(inputs: Iterable[Any]) -> Tensor:
    """Of what a forward gets, by name where that is known, which may lie in mappings or sequences, the tensor by which
    samples are counted: images or text, else the first that holds more than one number of each, else the first.

    Raises PlanError where there is none.
    """
    found = [(name, tensor) for name, tensor in tensors_in(inputs) if tensor.dim()]
    if not found:
        raise PlanError("the model was called in training without a tensor, by which its samples are counted")
    # The first of the best kind.
    return min(found, key=lambda each: 0 if each[0] in _SAMPLES else 1 if each[1].dim() > 1 else 2)[1]


_SAMPLES = ("pixel_values", "patches", "input_ids", "inputs_embeds")
"""What models of transformers, and timm's for patches, call what they are about."""


def tensors_in(inputs: Iterable[Any], names: Iterable[Any] | None = None) -> Iterator[tuple[Any, Tensor]]:
    """Those that lie in mappings or sequences too, each with its name; None where it has none."""
    for name, each in zip(names or repeat(None), inputs, strict=False):
        if isinstance(each, Mapping):
            yield from tensors_in(each.values(), each.keys())
        elif isinstance(each, list | tuple):
            yield from tensors_in(each)
        elif isinstance(each, Tensor):
            yield name, each
