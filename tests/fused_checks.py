"""Fused blocks against the plain reference: on a GPU, or on a CPU in Triton's interpreter.

TRITON_INTERPRET=1 python -m tests.fused_checks
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from math import prod
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from timm.models.eva import Eva
from torch import Tensor, nn

from d2ft_hpc.execution.accumulation import Accumulator, let_accumulate
from d2ft_hpc.execution.block import BlockHeads
from d2ft_hpc.execution.fused import run_fused
from d2ft_hpc.execution.kernels import add_heads, spread_heads, take_heads
from d2ft_hpc.execution.narrow import slices_of
from d2ft_hpc.families.head_axis import HeadAxis
from d2ft_hpc.families.table import family_of
from tests.masked import masked_blocks
from tests.models import CLASSES, DEPTH, HEADS, random_batch, tiny, tiny_vit
from tests.reference import reference_forward

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "layer_scale_and_qk_norm": {"init_values": 0.3, "qk_norm": True},
    "no_qkv_bias": {"qkv_bias": False},
    "odd_head_size": {"embed_dim": 72},
}


ROTARY: tuple[dict[str, Any], ...] = (
    {
        "qkv_bias": False,
        "init_values": 0.3,
        "rope_type": "dinov3",
        "rope_rotate_half": True,
        "num_reg_tokens": 4,
    },
    {"rope_type": "mixed", "attn_type": "rope", "qk_norm": True},  # others in each head
)
"""Of timm's Eva."""


def tiny_eva(seed: int, options: dict[str, Any]) -> nn.Module:
    return tiny(Eva, 0.05, seed, num_classes=CLASSES, head_init_scale=1.0, use_rot_pos_emb=True, **options)


def rotary_models() -> Iterator[tuple[int, nn.Module]]:
    """Those that this timm makes, with their seeds; it says which it does not."""
    for seed, options in enumerate(ROTARY):
        try:
            yield seed, tiny_eva(seed, options)
        except pytest.skip.Exception as lacking:
            print(lacking)


def rows(seed: int) -> np.ndarray:
    """uint8 [block, head] with a FULL head in each block: whole ones, single ones, with and without FORWARD_ONLY."""
    operations = np.random.default_rng(seed).integers(0, 3, (DEPTH, HEADS)).astype(np.uint8)
    operations[:, seed % HEADS] = 2
    operations[0] = [2, 0, 0]
    return operations


def fused_forward(model: nn.Module, images: Tensor, operations: np.ndarray, keeps: bool = True) -> Tensor:
    family: Any = family_of(model)
    x, beside = family.below(model, images)
    blocks = [family.kernel_parts(block) for block in model.blocks]
    for index, (block, row) in enumerate(zip(blocks, operations, strict=True)):
        assert block is not None
        full, forward_only = (np.flatnonzero(row == operation) for operation in (2, 1))
        places = np.full(HEADS, -1)
        places[full] = np.arange(full.size)
        order, at = (
            torch.from_numpy(each).to(x.device) for each in (np.concatenate([full, forward_only]), places)
        )
        following, given = [*blocks, None][index + 1], family.arguments(beside, index)
        x = run_fused(block, x, BlockHeads(order, full.size, at), following, keeps, **given)
    return model.forward_head(model.norm(x))


def gradients(model: nn.Module, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    loss = F.cross_entropy(logits.double(), labels)
    names, parameters = zip(*((n, p) for n, p in model.named_parameters() if p.requires_grad), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True))


def masked_forward(model: Any, images: Tensor, operations: np.ndarray) -> Tensor:
    with masked_blocks(model.blocks, ("attn.proj", "mlp.fc2"), operations):
        logits: Tensor = model(images)
    return logits


def check_against_reference(
    model: nn.Module,
    seed: int,
    device: str,
    samples: int = 6,
    reference: Callable[[nn.Module, Tensor, np.ndarray], Tensor] = reference_forward,
) -> None:
    """fp32: outputs and gradients of all parameters within 2e-6 of the largest."""
    model = model.to(device)
    images, labels = (tensor.to(device) for tensor in random_batch(seed, samples))
    operations = rows(seed)
    expected_logits = reference(model, images, operations)
    expected = gradients(model, expected_logits, labels)
    logits = fused_forward(model, images, operations)
    own = gradients(model, logits, labels)
    again = gradients(model, fused_forward(model, images, operations, keeps=False), labels)
    largest = max(float(each.abs().max()) for each in expected.values() if each is not None)
    torch.testing.assert_close(logits, expected_logits, rtol=1e-5, atol=1e-5)
    for name, value in expected.items():
        if value is None:  # timm's rotary positions of no frequencies
            continue
        torch.testing.assert_close(
            own[name], value, rtol=1e-4, atol=2e-6 * largest, msg=lambda m, n=name: f"{n}: {m}"
        )
        torch.testing.assert_close(again[name], own[name], rtol=1e-5, atol=1e-7 * largest)


def check_frozen(device: str) -> None:
    """Frozen parameters get no gradient, the others the same as before."""
    model = tiny_vit().to(device)
    images, labels = (tensor.to(device) for tensor in random_batch(0))
    whole = gradients(model, fused_forward(model, images, rows(0)), labels)
    for name in ("attn.qkv.weight", "mlp.fc1.weight", "mlp.fc2.weight", "attn.proj.bias"):
        model.blocks[1].get_parameter(name).requires_grad_(False)
    part = gradients(model, fused_forward(model, images, rows(0)), labels)
    assert len(part) == len(whole) - 4
    for name, value in part.items():
        torch.testing.assert_close(value, whole[name])


def check_accumulation(device: str, samples: int = 6) -> None:
    """Gradients that are added to a place are those that autograd would give, and autograd gives None for weights of
    which some heads train."""
    model = tiny_vit(**OPTIONS["layer_scale_and_qk_norm"]).to(device)
    images, labels = (tensor.to(device) for tensor in random_batch(0, samples))
    expected = gradients(model, fused_forward(model, images, rows(0)), labels)
    accumulators = {}
    for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"):
        for kind in ("weight", "bias"):
            parameter = model.blocks[1].get_parameter(f"{name}.{kind}")
            accumulators[f"blocks.1.{name}.{kind}"] = Accumulator(torch.ones_like(parameter))
            let_accumulate(parameter, accumulators[f"blocks.1.{name}.{kind}"])
    own = gradients(model, fused_forward(model, images, rows(0)), labels)
    for name, value in expected.items():
        accumulator = accumulators.get(name)
        if accumulator is not None and accumulator.got_any:
            assert own[name] is None, name
            torch.testing.assert_close(accumulator.place - 1, value, rtol=1e-4, atol=1e-6)
        else:
            torch.testing.assert_close(own[name], value)
    assert sum(each.got_any for each in accumulators.values()) == 6  # all but the biases that no head owns


def check_low_precision(device: str, autocast: bool, samples: int = 6) -> None:
    """bf16: the error against fp64 is at most twice the reference's own in bf16."""
    operations = rows(1)
    images, labels = (tensor.to(device) for tensor in random_batch(1, samples))
    model = tiny_vit(1).to(device)
    double = copy.deepcopy(model).double()
    exact = gradients(double, reference_forward(double, images.double(), operations), labels)
    errors = {}
    for name, forward in (("own", fused_forward), ("reference", reference_forward)):
        low = copy.deepcopy(model) if autocast else copy.deepcopy(model).bfloat16()
        with torch.autocast(device, torch.bfloat16, enabled=autocast, cache_enabled=False):
            logits = forward(low, images if autocast else images.bfloat16(), operations)
        found = gradients(low, logits, labels)
        errors[name] = sum(
            float((found[each].double() - value).square().sum())
            for each, value in exact.items()
            if value is not None
        )
    assert errors["own"] <= 4 * errors["reference"], errors


def check_copies(device: str) -> None:
    """Heads of equal and unequal shares, taken from parameters and spread back, against plain indexing."""
    of = HeadAxis.of_units
    axes = [
        *(of((2,), 3, units, (5,), splits_rows=True) for units in (13, 5000)),
        *(of((), 3, units, splits_rows=True) for units in (13, 12)),
        *(of((rows,), 3, units, splits_rows=False) for rows in (7, 40) for units in (13, 12, 600)),
        *(HeadAxis((40, 3, width), 1, splits_rows=False) for width in (8, 64, 150)),
        HeadAxis((3, 3, 4, 5), 1, splits_rows=True),
    ]
    parameters = [torch.randn(axis.parameter_shape, device=device) for axis in axes]
    slices = [slices_of(axis) for axis in axes]
    for order in ([2], [0, 2]):
        heads, places = (torch.tensor(each, device=device) for each in (order, [-1, -1, -1]))
        places[heads] = torch.arange(len(order), device=device)
        taken = take_heads(parameters, slices, heads, 3, None)
        spread = spread_heads(taken, parameters, slices, places, len(order))
        totals = [torch.ones_like(parameter) for parameter in parameters]
        add_heads(taken, totals, slices, places, len(order))
        for axis, parameter, part, whole, total in zip(axes, parameters, taken, spread, totals, strict=True):
            expected = axis.select(parameter, heads)
            assert torch.equal(whole, axis.spread(expected, heads)), axis
            assert torch.equal(total, whole + 1), axis
            units, inner = len(order) * axis.view_shape[axis.axis + 1], prod(axis.view_shape[axis.axis + 2 :])
            filled = part.view(prod(axis.view_shape[: axis.axis]), -1, inner)
            assert torch.equal(filled[:, :units].flatten(), expected.flatten()), axis
            assert not filled[:, units:].any()


def main() -> None:
    """All checks on a GPU; the interpreter, which takes minutes for them, runs a choice on two samples each."""
    if not torch.cuda.is_available():
        check_copies("cpu")
        check_against_reference(tiny_vit(1, **OPTIONS["layer_scale_and_qk_norm"]), 1, "cpu", samples=2)
        check_against_reference(tiny_vit(3, **OPTIONS["odd_head_size"]), 3, "cpu", samples=2)
        for seed, model in rotary_models():
            check_against_reference(model, seed, "cpu", 2, masked_forward)
        check_accumulation("cpu", samples=2)
        check_low_precision("cpu", autocast=True, samples=2)
    else:
        torch.backends.cuda.matmul.allow_tf32 = False
        check_copies("cuda")
        for seed, options in enumerate(OPTIONS.values()):
            check_against_reference(tiny_vit(seed, **options), seed, "cuda")
        for seed, model in rotary_models():
            check_against_reference(model, seed, "cuda", reference=masked_forward)
        check_frozen("cuda")
        check_accumulation("cuda")
        for autocast in (False, True):
            check_low_precision("cuda", autocast)
    print("fused blocks: ok")


if __name__ == "__main__":
    main()
