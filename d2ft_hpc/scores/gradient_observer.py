"""Fisher information of each subnet from training steps that run anyway, for loops whose loss we do not know."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from d2ft_hpc.metering.meter import meter
from d2ft_hpc.model.subnets import SubnetMap
from d2ft_hpc.scores.gradient_scores import gradients_of_heads, hooks_on_layers


class GradientObserver:
    """Adds up squared weight gradients of dense micro-batches, by slot, block and head, until `close`; also of frozen
    weights, where other parameters of the block train.

    A linear layer's gradients follow from its input and its output's gradient; parameters and their hooks are not
    touched, so that it works wherever an engine keeps them.
    """

    def __init__(
        self,
        model: nn.Module,
        subnets: SubnetMap,
        slots: int,
        current_slot: Callable[[], int],
        loss_scale: Callable[[], float],
    ) -> None:
        """current_slot: the place in its batch of the micro-batch that runs; loss_scale: what the engine multiplies
        each loss by before its backward pass."""
        device = next(model.parameters()).device
        self.sums = torch.zeros(slots, *subnets.shape, device=device)
        """float32 [slot, block, head]"""
        self.flops = 0
        """What adding up computed."""
        self._subnets, self._current_slot, self._loss_scale = subnets, current_slot, loss_scale
        self._blocks = {
            index: block
            for index, block in enumerate(subnets.blocks(model))
            if any(parameter.requires_grad for parameter in block.parameters())
        }
        self._handles = hooks_on_layers(self._blocks.items(), subnets, self._observe)

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _observe(
        self, block: int, name: str, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor
    ) -> None:
        if layer.training and torch.is_grad_enabled():
            if not output.requires_grad:  # everything up to here is frozen, but not the whole block
                output.requires_grad_()
            slot, layer_input = self._current_slot(), inputs[0].detach()
            output.register_hook(lambda gradient: self._add(slot, block, name, layer_input, gradient))

    @torch.no_grad()
    def _add(self, slot: int, block: int, name: str, layer_input: Tensor, output_gradient: Tensor) -> None:
        self.sums = self.sums.to(output_gradient.device)  # where the model may have moved since
        gradient = (output_gradient.float() / self._loss_scale()).flatten(0, -2)[None]
        inputs = layer_input.float().flatten(0, -2)[None]
        with meter() as metered:
            for axis, _, of_weight in gradients_of_heads(
                self._blocks[block], name, self._subnets, inputs, gradient
            ):
                self.sums[slot, block] += axis.sum_by_head(of_weight.square())[0]
        self.flops += metered.flops
