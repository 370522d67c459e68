"""Counts the floating-point operations that run and the bytes that collectives send."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from d2ft_hpc.execution.gradients import in_backward
from d2ft_hpc.planning.communication_volume import ring_bytes


@dataclass
class Metered:
    """Totals of one metered region on this rank, so far."""

    flops: int = 0
    """Floating-point operations of matrix products, convolutions and attention; a multiply-add counts as two."""
    recomputes: bool = False
    """Whether forwards ran inside a backward, as activation checkpointing makes them; `flops` has theirs, too."""
    operators: int = 0
    """Calls of operators, autograd's and collectives too, below everything that is written in Python."""
    bytes_sent: dict[str, int] = field(default_factory=dict)
    """Bytes that this rank sends, by collective ("allreduce", ...), under a ring algorithm."""


@contextmanager
def meter() -> Iterator[Metered]:
    """Counts what runs inside, backward included. It costs some microseconds for each operator, so meter single
    steps."""
    metered = Metered()
    with OperatorCounter(metered):
        yield metered


class OperatorCounter(TorchDispatchMode):
    """Sees operators, among them torch.distributed's collectives (`c10d`), as the dispatcher does; for `meter`, and
    for loops that have no place for a `with`. It uses torch's formulas, but not torch's FlopCounterMode, which keeps
    the graphs of all forwards inside until it ends, also the activations of one that ran out of memory.
    """

    def __init__(self, metered: Metered, counts_flops: Callable[[], bool] = lambda: True) -> None:
        """counts_flops: whether those of the operator that runs are to be counted."""
        super().__init__()  # type: ignore[no-untyped-call]
        self._metered, self._counts_flops = metered, counts_flops

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with self:  # in inference mode, operators arrive that are made of others
            result = func.decompose(*args, **kwargs)
        if result is not NotImplemented:
            return result
        self._metered.operators += 1
        if func.namespace == "c10d":
            name = func.overloadpacket.__name__.strip("_").removesuffix("_coalesced")
            group_size = _group_size(args)
            payload = max((_nbytes(arg) for arg in args), default=0)
            sent = self._metered.bytes_sent.get(name, 0) + round(ring_bytes(name, payload, group_size))
            self._metered.bytes_sent[name] = sent
        result = func(*args, **kwargs)
        if (count := _FLOPS.get(func.overloadpacket)) and self._counts_flops():
            self._metered.flops += count(*args, **kwargs, out_val=result)
            # A backward's own products build no graph. What engines do in its hooks may, but is no product.
            self._metered.recomputes |= torch.is_grad_enabled() and in_backward()
        return result


def _nbytes(argument: Any) -> int:
    if isinstance(argument, Tensor):
        return argument.nbytes
    if isinstance(argument, (list, tuple)):
        return sum(_nbytes(item) for item in argument)
    return 0


def _group_size(args: Any) -> int:
    for argument in args:
        if isinstance(argument, torch.ScriptObject) and "ProcessGroup" in str(argument._type()):
            return int(torch.distributed.ProcessGroup.unbox(argument).size())
    return torch.distributed.get_world_size()


def _attention(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> int:
    """[sample, head, token, channel]; several heads of `query` may share one of `key` and `value`, which the formulas
    of PyTorch 2.11 refuse."""
    scores, channels = _scores(query, key), query.shape[-1] + value.shape[-1]
    return 2 * scores * channels


def _attention_backward(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
) -> int:
    """Scores again, and the gradients of the scores, of values, queries and keys."""
    return 2 * _scores(query, key) * (3 * query.shape[-1] + 2 * value.shape[-1])


def _scores(query: Tensor, key: Tensor) -> int:
    return query.shape[:-1].numel() * key.shape[-2]


_KERNELS = ("efficient_attention", "flash_attention", "cudnn_attention")
_FLOPS = {
    **flop_registry,
    **{getattr(torch.ops.aten, f"_scaled_dot_product_{name}"): _attention for name in _KERNELS},
    **{
        getattr(torch.ops.aten, f"_scaled_dot_product_{name}_backward"): _attention_backward
        for name in _KERNELS
    },
    # Torch's own table does not know the CPU's kernel.
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
