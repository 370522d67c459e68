"""CUDA graphs compute what the same functions compute without them. Needs a GPU, no DeepSpeed, one process."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from d2ft_hpc.config import OptimizerConfig
from d2ft_hpc.engines.optimizer import build_optimizer, build_schedule
from d2ft_hpc.engines.plain import PlainEngine
from d2ft_hpc.execution.attach import attach
from d2ft_hpc.execution.cuda_graph import CudaGraphs
from d2ft_hpc.metering import meter
from d2ft_hpc.planning import Operation, SkipPlan
from d2ft_hpc.planning.samples import SampleOptions
from d2ft_hpc.selection import SampleScorer, SampleSelection
from tests.models import DEPTH, HEADS, random_batch, tiny_vit

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


FULL, SKIPPING = np.full((DEPTH, HEADS), Operation.FULL), np.eye(DEPTH, HEADS)
ROWS = {"full": FULL, "one head": np.roll(SKIPPING, 1) * 2, "forward only": np.maximum(SKIPPING * 2, 1)}
PLANS = [
    SkipPlan(np.stack([ROWS[name] for name in names]).astype(np.uint8), replicas=1)
    for names in (("one head", "forward only"), ("full", "one head"), ("forward only", "full"))
]
"""Of two micro-batches whose shapes change places from plan to plan."""


def trained(
    cuda_graphs: bool, compile: bool = False, plans: Sequence[SkipPlan] = ()
) -> tuple[list[float], list[Tensor]]:
    """Losses and parameters after steps of two micro-batches, the last ones smaller, one of them metered.

    plans: in force for two steps each; none: dense training.
    """
    torch.backends.cuda.matmul.allow_tf32 = False
    model = tiny_vit().cuda()
    executor = attach(model, compile=compile)
    config = OptimizerConfig(learning_rate=1e-2, name="sgd")
    optimizer = build_optimizer(model, config)
    engine = PlainEngine(
        model,
        executor,
        optimizer,
        build_schedule(optimizer, config, 6),
        F.cross_entropy,
        gradient_clipping=1.0,
        cuda_graphs=cuda_graphs,
    )
    losses = []
    for step in range(6):
        sizes = (6, 6) if step < 4 else (5, 3)
        batch = [random_batch(10 * step + slot, size) for slot, size in enumerate(sizes)]
        on_gpu = [(images.cuda(), labels.cuda()) for images, labels in batch]
        if plans:
            executor.activate(plans[step // 2], 0)
        if step == 0:
            with meter() as metered:
                losses.append(float(engine.step(on_gpu).loss))
            assert metered.flops > 0
        else:
            losses.append(float(engine.step(on_gpu).loss))
    return losses, [parameter.detach().clone() for parameter in model.parameters()]


@pytest.mark.parametrize("plans", [(), PLANS], ids=["dense", "changing plans"])
@pytest.mark.parametrize("compile", [False, True], ids=["eager", "compiled"])
def test_training_through_graphs_is_the_same_training(compile: bool, plans: Sequence[SkipPlan]) -> None:
    losses, parameters = trained(cuda_graphs=False, plans=plans)
    of_graphs, others = trained(cuda_graphs=True, compile=compile, plans=plans)
    assert of_graphs == pytest.approx(losses, rel=1e-5)
    for one, other in zip(parameters, others, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_scores_and_draws_through_graphs_are_the_same() -> None:
    model = tiny_vit().cuda()
    images, labels = (tensor.cuda() for tensor in random_batch(0, 12))
    plain, graphed = (
        SampleSelection(SampleScorer(model, 8), SampleOptions(), seed=0, replica=0, cuda_graphs=graphs)
        for graphs in (False, True)
    )
    for step, share in enumerate((0.5, 0.5, 0.75)):
        images, labels = images.roll(1, 0), labels.roll(1, 0)
        batch = [(images[:6], labels[:6]), (images[6:], labels[6:])]
        one, other = plain(batch, step, share), graphed(batch, step, share)
        for (part, targets), (same, their) in zip(one, other, strict=True):
            assert torch.equal(part, same)
            assert torch.equal(targets, their)


def test_another_thread_may_pin_memory_while_a_graph_is_captured() -> None:
    """As that of a data loader does; where it may not, the capture fails."""
    ended, pinned = threading.Event(), 0

    def pin() -> None:
        nonlocal pinned
        while not ended.is_set():
            torch.empty(2**22 + 4096 * pinned, dtype=torch.uint8, pin_memory=True)  # never one that is kept
            pinned += 1

    def slow(x: Tensor) -> Tensor:
        for _ in range(200):
            x = x @ x / 64
            time.sleep(0.002)
        return x

    thread = threading.Thread(target=pin)
    thread.start()
    try:
        x = torch.eye(64, device="cuda")
        result = CudaGraphs[Tensor]()(slow, x)
        torch.testing.assert_close(result, slow(x))
    finally:
        ended.set()
        thread.join()
    assert pinned > 5
