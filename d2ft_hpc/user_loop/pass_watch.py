"""Sees by the outputs of a model's forwards what becomes of a batch's passes."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor
from torch.autograd import Variable

from d2ft_hpc.user_loop.batch_counter import tensors_in


class PassWatch:
    """Which micro-batches of a batch have no backward yet, and whether the newest pass broke off, as where memory runs
    out and the loop catches the error.

    Where nobody sees the forward's end, as of a module that calls parts of the model, its passes count as whole.
    """

    def __init__(self) -> None:
        self.begin_batch()

    def begin_batch(self) -> None:
        self.is_in_forward = False
        """A forward has begun; an error of it counts."""
        self.broke_off = False
        """The newest forward or backward raised."""
        self._has_dropped = False
        self._awaited: set[int] = set()

    @property
    def is_whole(self) -> bool:
        """Whether every micro-batch had its forward and its backward, once."""
        return not (self._awaited or self.broke_off or self._has_dropped)

    def end_forward(self, slot: int, output: Any) -> None:
        """output: of micro-batch `slot`; None where its forward raised."""
        if output is None:
            self.broke_off = self.is_in_forward
            return
        for _, tensor in tensors_in([output]):
            if tensor.requires_grad:
                self._awaited.add(slot)
                tensor.register_hook(partial(self._begin_backward, slot))

    def drop(self, slot: int) -> None:
        """What was run of a micro-batch that broke off is no longer waited for."""
        self._awaited.discard(slot)
        self._has_dropped, self.broke_off = True, False

    def _begin_backward(self, slot: int, gradient: Tensor) -> None:
        self._awaited.discard(slot)
        self.broke_off = True  # until it ends
        Variable._execution_engine.queue_callback(self._end_backward)

    def _end_backward(self) -> None:
        self.broke_off = False
