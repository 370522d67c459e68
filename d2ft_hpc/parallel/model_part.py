"""The part of a model that one rank holds, under the model's parameter names."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from d2ft_hpc.execution.copies import copied_state
from d2ft_hpc.execution.executor import PlanExecutor
from d2ft_hpc.model.subnets import ParameterClass
from d2ft_hpc.parallel.head_split import check_parts
from d2ft_hpc.parallel.tensor import TensorParallelExecutor
from d2ft_hpc.parallel.token_exchange import TokenExchange


class ModelPart(nn.Module):
    """Neighbouring blocks of a model; the first and the last part also have all that lies before and after the
    blocks.

    A copy, of the model's class too: the model stays whole. Its blocks follow the model's executor under their own
    indices. With activation checkpointing each block keeps only its input and runs again in the backward, under the row
    that it had.
    """

    def __new__(cls, model: nn.Module | None = None, *args: Any) -> ModelPart:
        """model: None makes an empty one, as copies are made."""
        kind: Any = None if model is None else type(model)
        part: ModelPart = nn.Module.__new__(cls if kind is None else _part_of(kind))
        return part

    def __init__(self, model: nn.Module, blocks: range, executor: PlanExecutor) -> None:
        check_parts(executor.subnets.family)
        nn.Module.__init__(self)  # the model's own would make new weights
        self.__dict__.update(
            {name: value for name, value in copied_state(model).items() if name not in self.__dict__}
        )
        self.executor, self._family = executor, executor.subnets.family
        self.is_first = blocks.start == 0
        self.is_last = blocks.stop == executor.subnets.num_blocks
        self.num_classes: int
        self.tokens = self._family.tokens_between(model)
        """Tokens of a sample between the blocks; None if their number varies."""
        for name, parameter in model._parameters.items():
            self.register_parameter(name, copy.deepcopy(parameter) if self._keeps(name) else None)
        for name, module in model.named_children():
            if name != self._family.blocks_path and (self._keeps(name) or not list(module.parameters())):
                self.add_module(name, copy.deepcopy(module))
        of_model = self._family.blocks(model)
        self.blocks = nn.ModuleDict({str(index): copy.deepcopy(of_model[index]) for index in blocks})
        for index, block in self.blocks.items():
            executor.link(block, int(index))
        executor.images.link(self)

    def _keeps(self, name: str) -> bool:
        is_below = self.executor.subnets.classify(name) is ParameterClass.EMBEDDING
        return self.is_first if is_below else self.is_last

    def get_classifier(self) -> nn.Module:
        """The model's classifier; a module without parameters in a part that has none."""
        own: nn.Module = super().get_classifier() if self.is_last else nn.Identity()  # type: ignore[misc]
        return own

    def forward(self, x: Tensor) -> Tensor:
        """From images, or the output of the part below [sample, token, channel], to this part's output, or the logits
        in the last part.

        Between parts as between blocks, tensor-parallel ranks hold the tokens as their messages split them.
        """
        if self.is_first:
            # Scaled here and not only in the module of patches, which a GPU's faster way does not call. A twin for
            # images of any size, which scores samples, shares the modules and not the plan.
            trains = self.training and torch.is_grad_enabled() and self.executor.images.model is self
            with self.executor.images.scaled_before(x) if trains else nullcontext(x) as images:
                x, _ = self._family.below(self, images)
            x = x if self._messages is None else self._messages.split(x)
        again = self.training and self._family.recomputes(self)
        for block in self.blocks.values():
            x = self._again_in_backward(block, x) if again else block(x)
        if self.is_last:
            x = x if self._messages is None else self._messages.join(x)
            return self._family.above(self, x)
        # A pipeline sends a gradient back into every output, also where nothing here is trained.
        return x if x.requires_grad or not torch.is_grad_enabled() else x.detach().requires_grad_()

    @property
    def _messages(self) -> TokenExchange | None:
        return self.executor.messages if isinstance(self.executor, TensorParallelExecutor) else None

    def _again_in_backward(self, block: nn.Module, x: Tensor) -> Tensor:
        slot = self.executor.slot  # another micro-batch may be running by the time of the backward

        def run(x: Tensor) -> Tensor:
            if slot is None:
                return block(x)  # type: ignore[no-any-return]
            with self.executor.micro_batch(slot):
                return block(x)  # type: ignore[no-any-return]

        # Messages are sent again, and all ranks must send equally many.
        with set_checkpoint_early_stop(False):
            return checkpoint(run, x, use_reentrant=False)


@cache
def _part_of(kind: Any) -> type[ModelPart]:
    """Parts of models of this class, whose methods engines and optimisers call."""
    return type(kind.__name__, (ModelPart, kind), {})
