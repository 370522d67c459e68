"""Sees by the outputs of a model's forwards what becomes of a batch's passes."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor
from torch.autograd import Variable

from d2ft_hpc.user_loop.batch_counter import tensors_in


class PassWatch:
    """Which passes have no backward yet, and whether the newest one broke off, as where memory runs out and the loop
    catches the error.

    Where nobody sees the forward's end, as of a module that calls parts of the model, its passes count as whole.
    """

    def __init__(self) -> None:
        self._newest = 0
        self._awaited: set[int] = set()
        self.begin_batch()

    def begin_batch(self) -> None:
        self.is_in_forward = False
        """A forward has begun; an error of it counts."""
        self.broke_off = False
        """The newest forward or backward raised."""
        self._has_dropped = False
        self._before_batch = self._newest

    @property
    def awaited(self) -> int:
        """Passes without a backward since `forget`, of whatever batch."""
        return len(self._awaited)

    @property
    def is_whole(self) -> bool:
        """Whether every micro-batch of the batch had its forward and its backward, once."""
        lacks_one = max(self._awaited, default=0) > self._before_batch
        return not (lacks_one or self.broke_off or self._has_dropped)

    def begin_pass(self) -> None:
        self._newest += 1
        self.is_in_forward = True

    def end_forward(self, output: Any) -> None:
        """output: of the newest pass; None where its forward raised."""
        if output is None:
            self.broke_off = self.is_in_forward
            return
        for _, tensor in tensors_in([output]):
            if tensor.requires_grad:
                self._awaited.add(self._newest)
                tensor.register_hook(partial(self._begin_backward, self._newest))

    def drop(self) -> None:
        """What was run of the pass that broke off is no longer waited for."""
        self._awaited.discard(self._newest)
        self.drop_choice()

    def drop_choice(self) -> None:
        """What broke off came before a pass."""
        self._has_dropped, self.broke_off = True, False

    def forget(self) -> None:
        """No pass until now is waited for any more."""
        self._awaited.clear()

    def _begin_backward(self, index: int, gradient: Tensor) -> None:
        self._awaited.discard(index)
        self.broke_off = True  # until it ends
        Variable._execution_engine.queue_callback(self._end_backward)

    def _end_backward(self) -> None:
        self.broke_off = False
