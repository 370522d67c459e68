"""A model's own modules under a plan row, by masks before the layers that lead out of the heads; plain autograd."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from d2ft_hpc.execution.attach import attach
from d2ft_hpc.execution.executor import PlanExecutor
from d2ft_hpc.execution.gradients import Reduction
from d2ft_hpc.planning.plan import SkipPlan
from tests.reference import FORWARD_ONLY, FULL, SHORTCUT


@contextmanager
def masked_blocks(
    blocks: Sequence[nn.Module], outs: Sequence[str], row: np.ndarray, norms: Sequence[str] = ()
) -> Iterator[None]:
    """Inside, block b runs as row[b, head] says. outs: names of the layers that lead out of the heads, in a block;
    heads share what comes in as evenly as can be. norms: of those over all heads' channels, before such a layer."""
    patched: list[nn.Module] = []

    def patch(module: nn.Module, forward: Callable[..., Any]) -> None:
        module.forward = forward  # type: ignore[method-assign]
        patched.append(module)

    for block, operations in zip(blocks, row, strict=True):
        for name in outs:
            layer = block.get_submodule(name)
            patch(layer, _masked(layer, operations))
        for name in norms:
            norm = block.get_submodule(name)
            patch(norm, _masked_norm(norm, operations))
        if (operations == SHORTCUT).all():
            patch(block, lambda x, *args, **kwargs: x)
        elif not (operations == FULL).any():
            patch(block, _without_gradient(block))
    try:
        yield
    finally:
        for module in patched:
            del module.forward


def _masked(layer: Any, operations: np.ndarray) -> Callable[[Tensor], Tensor]:
    """What FULL heads give, with gradients, and what FORWARD_ONLY ones give, without."""
    operation = _of_units(operations, layer.in_features).to(layer.weight.device)
    whole = type(layer).forward

    def forward(x: Tensor) -> Tensor:
        beside = whole(layer, x * (operation == FORWARD_ONLY))
        if layer.bias is not None:
            beside = beside - layer.bias
        return whole(layer, x * (operation == FULL)) + beside.detach()

    return forward


def _masked_norm(norm: Any, operations: np.ndarray) -> Callable[[Tensor], Tensor]:
    """Mean and variance are those of the heads that run; FORWARD_ONLY ones come to them without gradients."""
    operation = _of_units(operations, norm.normalized_shape[0]).to(norm.weight.device)
    runs = operation != SHORTCUT

    def forward(x: Tensor) -> Tensor:
        x = torch.where(operation == FULL, x, x.detach())
        own = x[..., runs]
        variance, mean = torch.var_mean(own, -1, correction=0, keepdim=True)
        normed = torch.zeros_like(x)
        normed[..., runs] = (own - mean) / torch.sqrt(variance + norm.eps)
        return normed * norm.weight + norm.bias

    return forward


def _of_units(operations: np.ndarray, units: int) -> Tensor:
    """int64 [unit]: what the head of each does."""
    heads = len(operations)
    head = torch.tensor([next(h for h in range(heads) if u < (h + 1) * units // heads) for u in range(units)])
    return torch.tensor(operations.astype(int))[head]


def _without_gradient(block: Any) -> Callable[..., Tensor]:
    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return x + (type(block).forward(block, x, *args, **kwargs) - x).detach()

    return forward


def planned(model: nn.Module, row: np.ndarray) -> PlanExecutor:
    """Lets a model follow one row, uint8 [block, head], in each micro-batch."""
    executor = attach(model, embeddings="trained")
    executor.activate(SkipPlan(row[None], replicas=1), replica=0)
    executor.bind(lambda: 0, Reduction.AFTER_BACKWARD)
    return executor


LossAndGradients = tuple[Tensor, dict[str, Tensor]]


def assert_close(
    found: LossAndGradients,
    expected: LossAndGradients,
    is_compared: Callable[[str], bool] = lambda name: True,
    *,
    rtol: float,
    atol: float,
) -> None:
    """is_compared: of a parameter's name. rtol, atol: of gradients; losses are compared a thousand times as closely."""
    torch.testing.assert_close(found[0], expected[0], rtol=rtol / 1000, atol=1e-12)
    names = [name for name in expected[1] if is_compared(name)]
    own, others = ({name: each[1][name] for name in names} for each in (found, expected))
    torch.testing.assert_close(own, others, rtol=rtol, atol=atol)


def loss_and_gradients(model: nn.Module, loss: Tensor) -> LossAndGradients:
    """Of all parameters by name; absent ones are zeros."""
    model.zero_grad(set_to_none=True)
    loss.backward()
    return loss.detach(), {
        name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()
    }


def random_rows(depth: int, heads: int, seeds: int = 4) -> dict[str, np.ndarray]:
    """uint8 [block, head] by their names."""
    skipped = np.random.default_rng(9).integers(0, 3, (depth, heads))
    skipped[depth // 2] = SHORTCUT
    rows = {
        "all forward only": np.full((depth, heads), FORWARD_ONLY),
        "a block skipped": skipped,
        "forward only and shortcut": np.where(np.arange(heads) == 0, FORWARD_ONLY, SHORTCUT)[None].repeat(
            depth, 0
        ),
    }
    for seed in range(seeds):
        rows[f"random {seed}"] = np.random.default_rng(seed).integers(0, 3, (depth, heads))
    return {name: row.astype(np.uint8) for name, row in rows.items()}
