"""Shared by engines whose ranks each hold a part of the model: cutting the model, and putting it together again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn

from d2ft_hpc.engines.engine import StateWriter
from d2ft_hpc.engines.portable import PortableState, restore_schedule, schedule_numbers
from d2ft_hpc.engines.zero_state import collect, full_precision, restore
from d2ft_hpc.execution.executor import PlanExecutor
from d2ft_hpc.launch import Control, gathered
from d2ft_hpc.parallel.full_tensors import gather_full_tensors, part_of
from d2ft_hpc.parallel.model_part import ModelPart
from d2ft_hpc.parallel.rank_layout import Placement
from d2ft_hpc.parallel.tensor import share_blocks

PLACEMENT = "placement.json"
"""Name of a checkpoint's file that says which rank held what."""

MakeOptimizer = Callable[[nn.Module], tuple[Any, Any]]
"""Makes optimiser and schedule for a model or a part of one, or returns what `deepspeed.initialize` makes them
from."""


@dataclass(frozen=True)
class CutModel:
    """A model of which each rank trains a part.

    whole: the ranks copy their parts of it. executor: attached to it. placement: which rank has which part.
    options_for: gives other arguments of `deepspeed.initialize` for a part.
    """

    whole: nn.Module
    executor: PlanExecutor
    placement: Placement
    control: Control
    make_optimizer: MakeOptimizer
    options_for: Callable[[nn.Module], Mapping[str, Any]] = lambda part: {}


def share_part(part: ModelPart, cut: CutModel, group: distributed.ProcessGroup) -> PlanExecutor:
    """Cuts a part by head over a tensor-parallel group; returns the executor that its blocks follow from now on."""
    executor, placement = cut.executor, cut.placement
    layout = placement.layout
    if layout.tensor_ranks > 1:
        blocks = {int(index): block for index, block in part.blocks.items()}
        executor = part.executor = share_blocks(blocks, executor, placement.owner, group, part.tokens)
    for parameter in part.parameters():
        if layout.tensor_rank == 0:
            # DeepSpeed counts these in gradient norms on every rank, all others on the first of all stages only.
            parameter.model_parallel = True  # type: ignore[attr-defined]
    return executor


class CutEngine:
    """What engines have in common whose ranks each train a part of a model; all ranks call its methods together."""

    engine: Any
    """DeepSpeed's."""
    _cut: CutModel
    part: ModelPart
    _replica_group: distributed.ProcessGroup

    def share_logits(self, own: Sequence[Tensor], images: Sequence[Tensor]) -> list[Tensor]:
        """Sends the logits [sample, class] of one rank of the last stage to all ranks of a replica. own: that rank's
        logits for each of `images`; not read on other ranks."""
        layout = self._cut.placement.layout
        source = layout.rank_of(stage=layout.stages - 1, replica=layout.replica)
        samples = [len(of_slot) for of_slot in images]
        if layout.rank == source:
            shared = torch.cat([logits.float() for logits in own])
        else:
            shared = torch.empty(sum(samples), self.part.num_classes, device=images[0].device)
        distributed.broadcast(shared, source, group=self._replica_group)
        return list(shared.split(samples))

    @contextmanager
    def full_model(self) -> Iterator[nn.Module]:
        """The whole model with the trained weights of all ranks' parts."""
        own = {name: full_precision(parameter) for name, parameter in self.part.named_parameters()}
        targets = dict(self._cut.whole.named_parameters())
        with torch.no_grad():
            for name, value in self._of_all_parts(own).items():
                targets[name].copy_(value)
        yield self._cut.whole

    def save(self, folder: Path, write: StateWriter) -> None:
        """Writes the whole model's portable state and the placement."""
        own, control = collect(self.part, self.engine), self._cut.control
        kinds = sorted({kind for of_rank in gathered(control, sorted(own.moments)) for kind in of_rank})
        state = PortableState(
            self._of_all_parts(own.weights),
            {kind: self._of_all_parts(own.moments.get(kind, {})) for kind in kinds},
            own.numbers,
            schedule_numbers(self.engine.lr_scheduler),
        )
        if control.rank == 0:
            state.write(folder, write)
            self._cut.placement.write(folder / PLACEMENT)

    def restore(self, folder: Path) -> None:
        """Restores this rank's part of a portable state, whatever layout saved it."""
        state = PortableState.read(folder)
        names = {name for name, _ in self.part.named_parameters()}

        def of_part(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            return part_of(tensors, names, self._cut.executor.subnets, self._cut.placement)

        own = PortableState(
            of_part(state.weights),
            {kind: of_part(tensors) for kind, tensors in state.moments.items()},
            state.numbers,
        )
        restore(own, self.part, self.engine)
        restore_schedule(self.engine.lr_scheduler, state.schedule)

    def _of_all_parts(self, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        cut = self._cut
        return gather_full_tensors(own, cut.executor.subnets, cut.placement, cut.control)
