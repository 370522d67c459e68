"""Fisher information of each subnet that a rank holds of a cut model, from training steps that run anyway."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from d2ft_hpc.families.head_axis import HeadAxis
from d2ft_hpc.model.subnets import SubnetMap
from d2ft_hpc.parallel.head_split import heads_of
from d2ft_hpc.parallel.model_part import ModelPart
from d2ft_hpc.parallel.rank_layout import Placement


class PartObserver:
    """Adds up squared gradients of dense micro-batches, by slot, block and head, until `close`; zero for all subnets
    that other ranks hold.

    Each parameter gets one gradient from every micro-batch, in the order of the batch: that tells the slots apart, also
    in a pipeline, where another micro-batch may run forward meanwhile.
    """

    def __init__(
        self,
        part: ModelPart,
        subnets: SubnetMap,
        placement: Placement,
        slots: int,
        loss_scale: Callable[[], float],
    ) -> None:
        """loss_scale: what the engine multiplies each loss by before its backward pass."""
        device = next(part.parameters()).device
        self.sums = torch.zeros(slots, *subnets.shape, device=device)
        """float32 [slot, block, head]"""
        self.flops = 0
        self._loss_scale = loss_scale
        self._handles = []
        for index, block in part.blocks.items():
            heads = heads_of(placement.owner, int(index), placement.layout.tensor_rank).to(device)
            for name, parameter in block.named_parameters():
                if parameter.requires_grad and (axis := subnets.head_axes.get(name)):
                    hook = self._hook(int(index), heads, axis.of(heads.numel()))
                    self._handles.append(parameter.register_hook(hook))

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _hook(self, block: int, heads: Tensor, axis: HeadAxis) -> Callable[[Tensor], None]:
        seen = 0

        def observe(gradient: Tensor) -> None:
            nonlocal seen
            squares = (gradient.detach().float() / self._loss_scale()).square()
            self.sums[seen % len(self.sums), block, heads] += axis.sum_by_head(squares)
            seen += 1

        return observe
