"""Fused blocks on a GPU: exact, without recompiling or synchronising, with the memory that the plan says."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from d2ft_hpc.config import OptimizerConfig
from d2ft_hpc.engines.optimizer import build_optimizer, build_schedule
from d2ft_hpc.engines.plain import PlainEngine
from d2ft_hpc.execution.attach import attach
from d2ft_hpc.planning import Operation, SkipPlan
from tests import fused_checks
from tests.models import DEPTH, HEADS, random_batch, tiny_vit

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def static_plan(seed: int, slots: int = 2) -> SkipPlan:
    generator = np.random.default_rng(seed)
    row = np.array([Operation.FULL, Operation.FORWARD_ONLY, Operation.SHORTCUT], np.uint8)
    return SkipPlan(
        np.array([[generator.permutation(row[:HEADS]) for _ in range(DEPTH)] for _ in range(slots)]),
        replicas=1,
    )


def test_fused_blocks_equal_the_reference() -> None:
    fused_checks.main()


def trained(cuda_graphs: bool, recompute: bool = False) -> tuple[list[float], list[Tensor], int]:
    """Losses and parameters after steps under two static plans, and how many graphs were made."""
    torch.backends.cuda.matmul.allow_tf32 = False
    model = tiny_vit().cuda()
    executor = attach(model)
    if recompute:
        model.set_grad_checkpointing(True)
    config = OptimizerConfig(learning_rate=1e-2, name="sgd")
    optimizer = build_optimizer(model, config)
    schedule = build_schedule(optimizer, config, 6)
    engine = PlainEngine(model, executor, optimizer, schedule, F.cross_entropy, cuda_graphs=cuda_graphs)
    losses = []
    for step in range(6):
        if step in (0, 3):
            executor.activate(static_plan(step), 0)
        batch = [tuple(each.cuda() for each in random_batch(10 * step + slot)) for slot in range(2)]
        losses.append(float(engine.step(batch).loss))
    graphs = 0 if engine._graphs is None else sum(len(each._captures) for each in engine._graphs.values())
    return losses, [parameter.detach().clone() for parameter in model.parameters()], graphs


def test_one_graph_serves_all_rows_of_static_plans() -> None:
    losses, parameters, _ = trained(cuda_graphs=False)
    of_graphs, others, graphs = trained(cuda_graphs=True)
    assert graphs == 1
    assert of_graphs == pytest.approx(losses, rel=1e-5)
    for one, other in zip(parameters, others, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_recomputed_blocks_train_the_same() -> None:
    losses, parameters, _ = trained(cuda_graphs=False)
    again, others, _ = trained(cuda_graphs=False, recompute=True)
    assert again == pytest.approx(losses, rel=1e-6)
    for one, other in zip(parameters, others, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_nothing_waits_for_the_gpu() -> None:
    model = tiny_vit().cuda()
    executor = attach(model)
    executor.activate(static_plan(0), 0)
    images, labels = (each.cuda() for each in random_batch(0))
    for check in (False, True):
        torch.cuda.set_sync_debug_mode("error" if check else "default")
        try:
            with executor.micro_batch(0):
                F.cross_entropy(model(images), labels).backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
