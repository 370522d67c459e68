"""What only a GPU shows: fp16 under DeepSpeed, and skip execution on CUDA kernels. One process."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from d2ft_hpc.execution.attach import attach
from d2ft_hpc.metering import measure_costs, meter
from d2ft_hpc.planning import SkipPlan
from tests.distributed.engine_checks import deepspeed_engine, largest_difference, loss_function
from tests.models import DEPTH, HEADS, random_batch, tiny_vit
from tests.reference import reference_forward

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(scope="module", autouse=True)
def one_rank() -> Any:
    from d2ft_hpc.launch import connect, detect

    control = connect(detect({}), device_type="cuda")
    yield control
    control.close()


@pytest.mark.parametrize("seed", range(4))
def test_gradients_equal_reference_on_the_gpu(seed: int) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    row = np.random.default_rng(seed).integers(0, 3, (DEPTH, HEADS)).astype(np.uint8)
    reference = tiny_vit(init_values=0.1, qk_norm=True).cuda()
    model = copy.deepcopy(reference)
    images, labels = (tensor.cuda() for tensor in random_batch(seed))
    executor = attach(model, embeddings="trained")
    executor.activate(SkipPlan(row[None], replicas=1), 0)
    with executor.micro_batch(0):
        F.cross_entropy(model(images), labels).backward()
    F.cross_entropy(reference_forward(reference, images, row), labels).backward()
    for (name, parameter), other in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert (parameter.grad is None) == (other.grad is None), name
        if other.grad is not None:
            scale = max(1.0, float(other.grad.abs().max()))
            assert float((parameter.grad - other.grad).abs().max()) <= 1e-6 * scale, name


def test_an_fp16_overflow_drops_the_same_updates_as_without_us() -> None:
    """The first loss scales overflow."""

    def train(ours: bool) -> tuple[list[float], dict[str, nn.Parameter]]:
        model = tiny_vit().cuda()
        fp16 = {"enabled": True, "initial_scale_power": 30, "hysteresis": 1, "loss_scale_window": 100}
        wrapper = deepspeed_engine(model, "sgd", 1, precision="fp16", fp16=fp16)
        engine, rates = wrapper.engine, []
        if ours:
            wrapper.executor.activate(SkipPlan.dense(2, 1, DEPTH, HEADS), 0)
        for step in range(20):
            batch = [tuple(tensor.cuda() for tensor in random_batch(2 * step + slot, 4)) for slot in range(2)]
            if ours:
                wrapper.step(batch)
            else:
                for images, labels in batch:
                    engine.backward(loss_function(engine(images.half()), labels))
                    engine.step()
            rates.append(engine.get_lr()[0])
        return [float(engine.skipped_steps), *rates], dict(model.named_parameters())

    (with_us, own), (without_us, expected) = train(True), train(False)
    assert with_us == without_us
    assert 1 <= with_us[0] < 20
    assert largest_difference(own, expected) == 0


def test_counted_flops_are_the_plans_on_the_gpu() -> None:
    model = tiny_vit().cuda()
    executor = attach(model)
    costs = measure_costs(model, executor, (3, 16, 16))
    row = np.random.default_rng(0).integers(0, 3, (1, DEPTH, HEADS)).astype(np.uint8)
    executor.activate(SkipPlan(row, replicas=1), 0)
    images, labels = (tensor.cuda() for tensor in random_batch(0))
    with executor.micro_batch(0), meter() as metered:
        F.cross_entropy(model(images), labels).backward()
    assert metered.flops == pytest.approx(costs.planned_flops(row).sum() * len(labels))
