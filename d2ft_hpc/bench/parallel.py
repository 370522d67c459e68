"""Step time of pipeline and tensor parallelism under a makespan plan against dense: `d2ft-hpc bench parallel`."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer

from d2ft_hpc.config import OptimizerConfig
from d2ft_hpc.engines.deepspeed import deepspeed_config
from d2ft_hpc.engines.optimizer import build_optimizer, build_schedule
from d2ft_hpc.engines.pipeline import PipelineEngine
from d2ft_hpc.engines.tensor import TensorParallelEngine
from d2ft_hpc.errors import ConfigError
from d2ft_hpc.execution.executor import attach
from d2ft_hpc.launch import Control, share
from d2ft_hpc.metering import measure_costs
from d2ft_hpc.parallel.layout import Layout, Placement
from d2ft_hpc.parallel.stages import cut_stages, describe_stages, layer_flops
from d2ft_hpc.planning import Operation, PlanProblem, SkipPlan, in_order, simulate, solve

IMAGE_SIZE, PATCH_SIZE, HEAD_SIZE, CLASSES = 64, 8, 64, 10


@dataclass(frozen=True)
class Sizes:
    """What is trained: blocks x heads of 64 channels on 64 x 64 images (65 tokens)."""

    blocks: int = 8
    heads: int = 4
    micro_batches: int = 8
    samples: int = 8
    """Of a micro-batch."""


def benchmark(
    control: Control,
    *,
    stages: int,
    tensor_ranks: int,
    sizes: Sizes,
    compute_budget: float,
    repeats: int,
) -> dict[str, Any]:
    """Times steps of one engine under three plans in turn: dense, makespan, and all SHORTCUT; on all ranks together.

    The predicted time is what runs under all SHORTCUT, plus the rest of the dense step times the plan's share of it in
    the simulated pipeline and lock step (`simulate`). Raises ConfigError if the ranks do not form whole replicas.
    """
    layout = Layout.of(control.world_size, control.rank, stages=stages, tensor_ranks=tensor_ranks)
    if not layout.is_cut:
        raise ConfigError("bench parallel needs --pipeline-stages or --tensor-parallel above 1")
    torch.manual_seed(0)
    model = VisionTransformer(
        img_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        embed_dim=HEAD_SIZE * sizes.heads,
        depth=sizes.blocks,
        num_heads=sizes.heads,
        num_classes=CLASSES,
    )
    executor = attach(model)
    costs = measure_costs(model, executor, (3, IMAGE_SIZE, IMAGE_SIZE))
    flops = layer_flops(model, costs, (3, IMAGE_SIZE, IMAGE_SIZE))
    owner = in_order(sizes.blocks, sizes.heads, tensor_ranks)
    placement = Placement(layout, cut_stages(flops, stages), owner)
    shape = (sizes.micro_batches * layout.replicas, sizes.blocks, sizes.heads)
    scores = np.exp(np.random.default_rng(0).standard_normal((2, *shape)))
    problem = PlanProblem.parallel(
        *scores,
        replicas=layout.replicas,
        rank=owner,
        stage=placement.stage,
        compute_budget=compute_budget,
        forward_cost=costs.forward_share,
    )
    message = share(control, lambda: solve(problem, "makespan").to_bytes(), "the plan")
    plans = {
        "dense": SkipPlan.dense(sizes.micro_batches, layout.replicas, sizes.blocks, sizes.heads),
        "plan": SkipPlan.from_bytes(message),
        "always": SkipPlan(np.full(shape, Operation.SHORTCUT, np.uint8), layout.replicas),
    }
    engine = _engine(control, model, executor, placement, sizes)
    seconds = _time_steps(control, engine, plans, layout, sizes, repeats)
    medians = {name: float(np.median(times)) for name, times in seconds.items()}
    simulated = simulate(plans["plan"], problem).step / simulate(plans["dense"], problem).step
    always = medians["always"] / medians["dense"]
    return {
        "ranks": control.world_size,
        "pipeline_stages": stages,
        "tensor_parallel": tensor_ranks,
        "stages": describe_stages(flops, placement.stages) if stages > 1 else "",
        "planned_flops": costs.planned_share(plans["plan"]),
        "dense_seconds": medians["dense"],
        "plan_seconds": medians["plan"],
        "always_share": always,
        "measured": medians["plan"] / medians["dense"],
        "predicted": always + (1 - always) * simulated,
        "ratios": [plan / dense for plan, dense in zip(seconds["plan"], seconds["dense"], strict=True)],
    }


def _engine(
    control: Control, model: VisionTransformer, executor: Any, placement: Placement, sizes: Sizes
) -> PipelineEngine | TensorParallelEngine:
    settings = OptimizerConfig(name="sgd", learning_rate=1e-4)
    config = deepspeed_config(
        {},
        micro_batch_size=sizes.samples,
        slots=sizes.micro_batches,
        precision="fp32",
        gradient_clipping=None,
    )

    def make_optimizer(part: VisionTransformer) -> Any:
        optimizer = build_optimizer(part, settings)
        return optimizer, build_schedule(optimizer, settings, 1_000_000)

    kind = PipelineEngine if placement.layout.stages > 1 else TensorParallelEngine
    return kind(model, executor, placement, make_optimizer, F.cross_entropy, config, control)


def _time_steps(
    control: Control,
    engine: PipelineEngine | TensorParallelEngine,
    plans: dict[str, SkipPlan],
    layout: Layout,
    sizes: Sizes,
    repeats: int,
) -> dict[str, list[float]]:
    """Seconds of each step by plan, until all ranks are done; one step of each plan before the clock starts."""
    generator = torch.Generator().manual_seed(layout.replica)
    batch = [
        (
            torch.randn(sizes.samples, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator),
            torch.randint(CLASSES, (sizes.samples,), generator=generator),
        )
        for _ in range(sizes.micro_batches)
    ]
    seconds: dict[str, list[float]] = {name: [] for name in plans}
    for repeat in range(repeats + 1):
        for name, plan in plans.items():
            engine.executor.load(plan, layout.replica)
            control.barrier(60)
            start = time.perf_counter()
            engine.step(batch)
            control.barrier(60)
            if repeat > 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def report(result: dict[str, Any], *, as_json: bool) -> str:
    """What was measured beside what was predicted; with `as_json` its last line is the result as one JSON object."""
    low, high = np.quantile(result["ratios"], [0.25, 0.75])
    lines = [
        f"{result['ranks']} ranks: {result['pipeline_stages']} pipeline stages x {result['tensor_parallel']} "
        f"tensor-parallel ranks",
        *filter(None, [result["stages"]]),
        f"dense step {1e3 * result['dense_seconds']:.1f} ms, of which {result['always_share']:.1%} always runs",
        f"plan: {result['planned_flops']:.1%} of the dense FLOPs; step time predicted {result['predicted']:.1%}, "
        f"measured {result['measured']:.1%} of dense (quartiles of pairs {low:.1%} to {high:.1%}, "
        f"{len(result['ratios'])} pairs)",
    ]
    if as_json:
        lines.append(json.dumps(result))
    return "\n".join(lines)
