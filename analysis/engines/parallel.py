"""Step time of pipeline and tensor parallelism under a makespan plan against dense and the prediction:

mpirun -n 2 python -m analysis.engines.parallel --pipeline-stages 2
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer

from d2ft_hpc.bench.turns import Ratio, alternate
from d2ft_hpc.command import share as share_of
from d2ft_hpc.command import whole_number
from d2ft_hpc.config import OptimizerConfig
from d2ft_hpc.engines.deepspeed import deepspeed_config
from d2ft_hpc.engines.engine import MicroBatch
from d2ft_hpc.engines.model_parallel import CutModel
from d2ft_hpc.engines.optimizer import build_optimizer, build_schedule
from d2ft_hpc.engines.pipeline import PipelineEngine
from d2ft_hpc.engines.tensor import TensorParallelEngine
from d2ft_hpc.errors import ConfigError
from d2ft_hpc.execution.attach import attach
from d2ft_hpc.launch import Control, connect, detect, run_guarded, share
from d2ft_hpc.metering import StepCosts, measure_costs
from d2ft_hpc.parallel.rank_layout import Placement, RankLayout
from d2ft_hpc.parallel.stages import cut_stages, describe_stages, layer_flops
from d2ft_hpc.planning import (
    Budgets,
    Devices,
    GivenShares,
    Operation,
    PlanProblem,
    SkipPlan,
    in_order,
    pose,
    simulate,
    solve,
)
from d2ft_hpc.planning.communication_volume import TokenLayout

IMAGE_SIZE, PATCH_SIZE, CLASSES = 64, 8, 10
TOKENS = (IMAGE_SIZE // PATCH_SIZE) ** 2 + 1


@dataclass(frozen=True)
class Sizes:
    """What is trained: blocks x heads on 64 x 64 images (65 tokens)."""

    blocks: int = 8
    heads: int = 4
    micro_batches: int = 8
    samples: int = 8
    """Of a micro-batch."""
    head_size: int = 64
    """Channels of a head."""

    def model(self) -> VisionTransformer:
        return VisionTransformer(
            img_size=IMAGE_SIZE,
            patch_size=PATCH_SIZE,
            embed_dim=self.head_size * self.heads,
            depth=self.blocks,
            num_heads=self.heads,
            num_classes=CLASSES,
        )


@dataclass(frozen=True, eq=False)
class Setting:
    """An engine on this rank, the whole model, its placement, and what plans for it reckon with."""

    sizes: Sizes
    model: VisionTransformer
    placement: Placement
    costs: StepCosts
    flops: list[float]
    engine: PipelineEngine | TensorParallelEngine

    @property
    def shape(self) -> tuple[int, int, int]:
        """Rows, blocks, heads."""
        replicas = self.placement.layout.replicas
        return (self.sizes.micro_batches * replicas, self.sizes.blocks, self.sizes.heads)

    @property
    def slots(self) -> int:
        return self.sizes.micro_batches

    @property
    def micro_batch_size(self) -> int:
        return self.sizes.samples

    def problem(self, budgets: Budgets, messages: TokenLayout | None = None) -> PlanProblem:
        """With the same log-normal scores on every rank."""
        return posed(self.sizes, self.placement, self.costs, budgets, messages)

    def plan_of(self, operation: Operation) -> SkipPlan:
        """Every subnet does the same."""
        operations = np.full(self.shape, operation, np.uint8)
        return SkipPlan(operations, self.placement.layout.replicas)

    def batch(self) -> list[MicroBatch]:
        """Of this replica."""
        generator = torch.Generator().manual_seed(self.placement.layout.replica)
        return [
            (
                torch.randn(self.sizes.samples, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator),
                torch.randint(CLASSES, (self.sizes.samples,), generator=generator),
            )
            for _ in range(self.sizes.micro_batches)
        ]


def posed(
    sizes: Sizes,
    placement: Placement,
    costs: StepCosts,
    budgets: Budgets,
    messages: TokenLayout | None = None,
) -> PlanProblem:
    """With the same log-normal scores on every rank."""
    shape = (sizes.micro_batches * placement.layout.replicas, sizes.blocks, sizes.heads)
    scores = np.exp(np.random.default_rng(0).standard_normal((2, *shape)))
    devices = Devices(placement.layout.replicas, placement.owner, placement.stage)
    return pose(scores, GivenShares(costs.forward_share), budgets, devices, messages)


def placed(sizes: Sizes, layout: RankLayout, flops: list[float]) -> Placement:
    """The model's parts on the ranks. flops: of each layer (`layer_flops`)."""
    owner = in_order(sizes.blocks, sizes.heads, layout.tensor_ranks)
    return Placement(layout, cut_stages(flops, layout.stages), owner)


def set_up(control: Control, *, stages: int, tensor_ranks: int, sizes: Sizes) -> Setting:
    """On all ranks together. Raises ConfigError if the ranks do not form whole replicas."""
    layout = RankLayout.of(control.world_size, control.rank, stages=stages, tensor_ranks=tensor_ranks)
    torch.manual_seed(0)
    model = sizes.model()
    executor = attach(model)
    costs = measure_costs(model, executor, (3, IMAGE_SIZE, IMAGE_SIZE))
    flops = layer_flops(model, costs, (3, IMAGE_SIZE, IMAGE_SIZE))
    placement = placed(sizes, layout, flops)
    engine = _engine(control, model, executor, placement, sizes)
    return Setting(sizes, model, placement, costs, flops, engine)


def benchmark(
    control: Control,
    *,
    stages: int,
    tensor_ranks: int,
    sizes: Sizes,
    compute_budget: float,
    repeats: int,
) -> dict[str, Any]:
    """Times steps of one engine under three plans in turns: dense, makespan, and all SHORTCUT; on all ranks together.

    The predicted time is what runs under all SHORTCUT, plus the rest of the dense step times the plan's share of it in
    the simulated pipeline and lock step (`simulate`). Raises ConfigError if the ranks do not form whole replicas.
    """
    if stages * tensor_ranks == 1:
        raise ConfigError("parallel: needs --pipeline-stages or --tensor-parallel above 1")
    setting = set_up(control, stages=stages, tensor_ranks=tensor_ranks, sizes=sizes)
    problem = setting.problem(Budgets(compute_budget))
    message = share(control, lambda: solve(problem, "makespan").to_bytes(), "the plan")
    plans = {
        "dense": setting.plan_of(Operation.FULL),
        "plan": SkipPlan.from_bytes(message),
        "always": setting.plan_of(Operation.SHORTCUT),
    }
    engine, batch, replica = setting.engine, setting.batch(), setting.placement.layout.replica
    seconds = alternate(
        {name: lambda: engine.step(batch) for name in plans},
        repeats,
        torch.device("cpu"),
        control,
        before=lambda name: engine.executor.activate(plans[name], replica),
        warm_up=1,
    )
    medians = {name: float(np.median(times)) for name, times in seconds.items()}
    simulated = simulate(plans["plan"], problem).step / simulate(plans["dense"], problem).step
    always = medians["always"] / medians["dense"]
    return {
        "ranks": control.world_size,
        "pipeline_stages": stages,
        "tensor_parallel": tensor_ranks,
        "stages": describe_stages(setting.flops, setting.placement.stages) if stages > 1 else "",
        "planned_flops": setting.costs.planned_share(plans["plan"]),
        "dense_seconds": medians["dense"],
        "plan_seconds": medians["plan"],
        "always_share": always,
        "plan_over_dense": asdict(Ratio.of(seconds["plan"], seconds["dense"])),
        "predicted": always + (1 - always) * simulated,
        "seconds": {name: of_name.tolist() for name, of_name in seconds.items()},
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
    return kind(CutModel(model, executor, placement, control, make_optimizer), F.cross_entropy, config)


def report(result: dict[str, Any], *, as_json: bool) -> str:
    """What was measured beside what was predicted; with `as_json` its last line is the result as one JSON object."""
    lines = [
        f"{result['ranks']} ranks: {result['pipeline_stages']} pipeline stages x {result['tensor_parallel']} "
        f"tensor-parallel ranks",
        *filter(None, [result["stages"]]),
        f"dense step {1e3 * result['dense_seconds']:.1f} ms, of which {result['always_share']:.1%} always runs",
        f"plan: {result['planned_flops']:.1%} of the dense FLOPs",
        f"its step over the dense one, predicted  {result['predicted']:.4f}",
        f"its step over the dense one, measured   {Ratio(**result['plan_over_dense'])}",
    ]
    if as_json:
        lines.append(json.dumps(result))
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="parallel", description=__doc__)
    parser.add_argument("--pipeline-stages", type=whole_number(1), default=1)
    parser.add_argument("--tensor-parallel", type=whole_number(1), default=1)
    parser.add_argument("--blocks", type=whole_number(1), default=8)
    parser.add_argument("--heads", type=whole_number(1), default=4)
    parser.add_argument("--micro-batches", type=whole_number(1), default=8, help="of each replica")
    parser.add_argument("--samples", type=whole_number(1), default=8, help="of a micro-batch")
    parser.add_argument("--compute-budget", type=share_of(), default=0.6, help="share of the dense step")
    parser.add_argument("--repeats", type=whole_number(1), default=15, help="steps of each plan")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    options = parser.parse_args()
    control = connect(detect(), device_type="cpu")

    def run() -> None:
        result = benchmark(
            control,
            stages=options.pipeline_stages,
            tensor_ranks=options.tensor_parallel,
            sizes=Sizes(options.blocks, options.heads, options.micro_batches, options.samples),
            compute_budget=options.compute_budget,
            repeats=options.repeats,
        )
        if control.rank == 0:
            print(report(result, as_json=options.json))

    return run_guarded(control, run)


if __name__ == "__main__":
    sys.exit(run_guarded(None, main))
