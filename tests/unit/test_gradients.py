"""Gradients that come at one point of the backward pass, whatever ran."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer

from d2ft_hpc.execution.attach import attach
from d2ft_hpc.execution.gradients import Reduction
from d2ft_hpc.planning import SkipPlan
from tests.models import DEPTH, HEADS, random_batch, tiny_vit
from tests.reference import reference_forward


def rows() -> Iterator[np.ndarray]:
    """uint8 [block, head]: drawn ones, and whole blocks SHORTCUT, FORWARD_ONLY and FULL."""
    rng = np.random.default_rng(0)
    for _ in range(4):
        yield rng.integers(0, 3, (DEPTH, HEADS)).astype(np.uint8)
        yield np.repeat(rng.integers(0, 3, (DEPTH, 1)), HEADS, axis=1).astype(np.uint8)
    yield np.full((DEPTH, HEADS), 2, np.uint8)
    yield np.zeros((DEPTH, HEADS), np.uint8)


def order_of_gradients(model: VisionTransformer, row: np.ndarray, **options: str) -> list[str]:
    """Names of the trained parameters in the order in which their gradients come, beside a replica that skips all."""
    executor = attach(model, **options)
    executor.bind(None, Reduction.EVERY_MICRO_BATCH)
    executor.activate(SkipPlan(np.stack([row, np.zeros_like(row)]), replicas=2), 0)
    order: list[str] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda _, name=name: order.append(name))
    images, labels = random_batch(0)
    with executor.micro_batch(0):
        F.cross_entropy(model(images), labels).backward()
    return order


@pytest.mark.parametrize("embeddings", ["frozen", "complete_path", "trained"])
def test_every_row_gives_all_gradients_in_one_order(embeddings: str) -> None:
    orders = [order_of_gradients(tiny_vit(), row, embeddings=embeddings) for row in rows()]
    assert all(order == orders[0] for order in orders)
    model = tiny_vit()
    attach(model, embeddings=embeddings)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert set(orders[0]) == trained
    assert len(orders[0]) == len(trained)


@pytest.mark.parametrize("index", range(10))
def test_gradients_are_those_of_the_row_and_zero_elsewhere(index: int) -> None:
    row = list(rows())[index]
    model, reference = tiny_vit(), tiny_vit()
    order_of_gradients(model, row)
    attach(reference)  # freezes the same parameters
    images, labels = random_batch(0)
    F.cross_entropy(reference_forward(reference, images, row), labels).backward()
    for (name, own), expected in zip(model.named_parameters(), reference.parameters(), strict=True):
        if own.requires_grad:
            zero = torch.zeros_like(own)
            wanted = zero if expected.grad is None else expected.grad
            assert own.grad is not None, name
            torch.testing.assert_close(own.grad, wanted, rtol=1e-5, atol=1e-6, msg=name)
        assert isinstance(own, torch.nn.Parameter), name


def test_blocks_that_all_replicas_run_densely_are_left_alone() -> None:
    model = tiny_vit()
    executor = attach(model)
    executor.bind(None, Reduction.EVERY_MICRO_BATCH)
    executor.activate(SkipPlan.dense(1, 2, DEPTH, HEADS), 0)
    seen = []
    model.blocks[1].attn.register_forward_pre_hook(
        lambda attn, _: seen.append(isinstance(attn.qkv.weight, torch.nn.Parameter))
    )
    with executor.micro_batch(0):
        model(random_batch(0)[0])
    assert seen == [True]


def test_reductions_need_complete_gradients_only_where_they_happen() -> None:
    happens = {kind: [any(kind.may_happen_in(slot, 3)) for slot in range(3)] for kind in Reduction}
    assert happens == {
        Reduction.AFTER_BACKWARD: [False, False, False],
        Reduction.LAST_MICRO_BATCH: [False, False, True],
        Reduction.EVERY_MICRO_BATCH: [True, True, True],
        Reduction.AS_LOOP_SAYS: [True, True, True],
        Reduction.BY_BLOCK: [False, False, False],
    }
