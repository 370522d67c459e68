"""Run under a launcher: each check trains through DeepSpeed and compares with one process; rank 0 prints JSON.

A check's result is the largest difference of any parameter, or a dict of facts; the tests judge them.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from d2ft_hpc.config import OptimizerConfig
from d2ft_hpc.engines.deepspeed import DeepSpeedEngine, deepspeed_config
from d2ft_hpc.engines.optimizer import build_optimizer, build_schedule
from d2ft_hpc.engines.plain import PlainEngine
from d2ft_hpc.execution.executor import attach
from d2ft_hpc.launch import Control, connect, detect
from d2ft_hpc.planning import SkipPlan
from tests.models import DEPTH, HEADS, random_batch, tiny_vit

SLOTS, STEPS = 2, 3


def plan_of(kind: str, step: int, replicas: int) -> SkipPlan:
    """Rows [slot * replicas + replica]; for every kind but "same" they differ between replicas."""
    rng = np.random.default_rng((7, step))
    operations = rng.integers(0, 3, (SLOTS * replicas, DEPTH, HEADS)).astype(np.uint8)
    if kind == "full":
        operations[:] = 2
    elif kind == "same":
        operations = np.repeat(operations[:SLOTS], replicas, axis=0)
    elif kind == "whole blocks":
        operations[rng.random((SLOTS * replicas, DEPTH)) < 0.5] = 0
        operations[:, 1] = 0  # a block that nobody runs
    return SkipPlan(operations, replicas)


def micro_batch(step: int, row: int, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The last step is a partial batch: its rows differ in size."""
    samples = 4 if step < STEPS - 1 else 2 + row % 2
    return random_batch(step * rows + row, samples)


def loss_function(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.float(), labels)


def optimizer_config(name: str) -> OptimizerConfig:
    # AdamW divides by the gradient's size: with its usual epsilon, rounding in the smallest gradients becomes steps.
    return OptimizerConfig(
        name=name, learning_rate=0.05 if name == "sgd" else 1e-3, epsilon=1e-6, warmup_steps=2
    )


def reference_parameters(
    model: nn.Module, kind: str, optimizer_name: str, clipping: float | None, replicas: int
) -> Any:
    """What one process gets from the same rows."""
    executor = attach(model)
    optimizer = build_optimizer(model, optimizer_config(optimizer_name))
    schedule = build_schedule(optimizer, optimizer_config(optimizer_name), STEPS)
    engine = PlainEngine(model, executor, optimizer, schedule, loss_function, gradient_clipping=clipping)
    dtype = next(model.parameters()).dtype
    for step in range(STEPS):
        plan = plan_of(kind, step, replicas)
        executor.load(SkipPlan(plan.operations, replicas=1), 0)
        batch = [micro_batch(step, row, plan.num_rows) for row in range(plan.num_rows)]
        engine.step([(images.to(dtype), labels) for images, labels in batch])
    return dict(model.named_parameters())


def deepspeed_engine(
    model: nn.Module,
    optimizer_name: str,
    stage: int,
    *,
    precision: str = "fp32",
    clipping: float | None = None,
    zero: dict[str, Any] | None = None,
    **more: Any,
) -> DeepSpeedEngine:
    optimizer = build_optimizer(model, optimizer_config(optimizer_name))
    schedule = build_schedule(optimizer, optimizer_config(optimizer_name), STEPS)
    settings = {"zero_optimization": {"stage": stage, **(zero or {})}}
    config = deepspeed_config(
        settings, micro_batch_size=4, slots=SLOTS, precision=precision, gradient_clipping=clipping
    )
    return DeepSpeedEngine(model, attach(model), optimizer, schedule, loss_function, {**config, **more})


def trained_parameters(
    control: Control, model: nn.Module, engine: DeepSpeedEngine, kind: str
) -> dict[str, nn.Parameter]:
    for step in range(STEPS):
        plan = plan_of(kind, step, control.world_size)
        engine.executor.load(plan, control.rank)
        rows = [slot * control.world_size + control.rank for slot in range(SLOTS)]
        engine.step([micro_batch(step, row, plan.num_rows) for row in rows])
    with engine.full_model() as full:
        return dict(full.named_parameters())


def largest_difference(one: Any, other: Any) -> float:
    return max(
        float((one[name].detach().double() - other[name].detach().double()).abs().max()) for name in other
    )


def check_fp32(
    control: Control, kind: str, stage: int, optimizer_name: str, clipping: float | None = None
) -> float:
    # A key bias has a gradient of zero but for rounding, which AdamW would turn into steps of full size.
    options = {"qkv_bias": optimizer_name == "sgd"}
    model = tiny_vit(**options)
    engine = deepspeed_engine(model, optimizer_name, stage, clipping=clipping)
    own = trained_parameters(control, model, engine, kind)
    expected = reference_parameters(tiny_vit(**options), kind, optimizer_name, clipping, control.world_size)
    return largest_difference(own, expected)


def check_bf16(control: Control, kind: str, stage: int) -> dict[str, float]:
    """Root-mean-square distance from fp64, of the plan under DeepSpeed and of the dense model under DeepSpeed."""

    def error(of_kind: str) -> float:
        model = tiny_vit()
        own = trained_parameters(
            control, model, deepspeed_engine(model, "sgd", stage, precision="bf16"), of_kind
        )
        exact = reference_parameters(tiny_vit().double(), of_kind, "sgd", None, control.world_size)
        squares = [(own[name].double() - exact[name]).square().flatten() for name in exact]
        return float(torch.cat(squares).mean().sqrt())

    return {"plan": error(kind), "dense": error("full")}


def check_bytes(control: Control) -> dict[str, Any]:
    """Bytes of a step's all-reduce as counted, beside the gradients' size."""
    from d2ft_hpc.metering import meter

    model = tiny_vit()
    engine = deepspeed_engine(model, "sgd", 0)
    engine.executor.load(plan_of("random", 0, control.world_size), control.rank)
    with meter() as metered:
        engine.step([micro_batch(0, slot, SLOTS) for slot in range(SLOTS)])
    gradients = sum(p.numel() * 4 for p in model.parameters() if p.requires_grad)
    return {
        "counted": metered.bytes_sent,
        "ring": 2 * (control.world_size - 1) / control.world_size * gradients,
    }


def checks(world_size: int) -> dict[str, Callable[[Control], Any]]:
    named: dict[str, Callable[[Control], Any]] = {}
    for kind in ("full", "same", "random", "whole blocks"):
        for stage in (0, 1):
            for optimizer_name in ("sgd", "adamw"):
                if world_size == 2 or kind == "random":
                    named[f"fp32 {kind} zero{stage} {optimizer_name}"] = (
                        lambda c, k=kind, s=stage, o=optimizer_name: check_fp32(c, k, s, o)
                    )
    named["fp32 random zero1 adamw clipped"] = lambda c: check_fp32(c, "random", 1, "adamw", 0.05)
    if world_size == 2:
        named["bf16 random zero0"] = lambda c: check_bf16(c, "random", 0)
        named["bf16 whole blocks zero1"] = lambda c: check_bf16(c, "whole blocks", 1)
        named["bytes"] = check_bytes
    return named


def main() -> None:
    torch.set_num_threads(1)
    control = connect(detect(), device_type="cpu")
    results = {}
    for name, check in checks(control.world_size).items():
        results[name] = check(control)
        gathered = control.all_gather(json.dumps(results[name]).encode())
        if control.rank == 0 and isinstance(results[name], float):
            results[name] = max(json.loads(part) for part in gathered)
    if control.rank == 0:
        print("RESULTS " + json.dumps(results))
    control.close()


if __name__ == "__main__":
    sys.exit(main())
