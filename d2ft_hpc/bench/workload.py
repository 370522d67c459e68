"""What engines are timed with: a model on random images, under plans for random scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from d2ft_hpc.config import OptimizerConfig, RunConfig
from d2ft_hpc.config_faults import validated
from d2ft_hpc.engines.build import build_engine
from d2ft_hpc.engines.engine import Engine, MicroBatch
from d2ft_hpc.engines.kinds.table import ENGINES
from d2ft_hpc.engines.optimizer import build_optimizer, build_schedule
from d2ft_hpc.execution.attach import attach
from d2ft_hpc.launch import Control
from d2ft_hpc.metering import StepCosts, measure_costs
from d2ft_hpc.model.build import build_model
from d2ft_hpc.parallel.head_split import even_owner
from d2ft_hpc.parallel.rank_layout import Placement, RankLayout
from d2ft_hpc.parallel.stages import cut_stages, layer_flops
from d2ft_hpc.planning import Budgets, Devices, PlanProblem, pose
from d2ft_hpc.planning.dense import DENSE

_LEARNING_RATE, _STEPS = 1e-4, 10**6


@dataclass(frozen=True)
class Workload:
    model: str
    image_size: int
    micro_batch_size: int
    slots: int
    stage: int
    """Of ZeRO."""
    precision: str
    steps: int
    """Measured steps of each of the things compared."""
    device: torch.device
    engine: str = "deepspeed"
    """Or ddp, fsdp2."""
    pipeline_stages: int = 1
    tensor_parallel: int = 1
    compile: bool = False
    cuda_graphs: bool = False
    """As `attach` takes them."""

    @property
    def config(self) -> RunConfig:
        """Of a run with this engine. Raises ConfigError where there can be none."""
        engine = {
            "name": self.engine,
            "precision": self.precision,
            "pipeline_stages": self.pipeline_stages,
            "tensor_parallel": self.tensor_parallel,
            "compile": self.compile,
            "cuda_graphs": self.cuda_graphs,
        }
        if ENGINES[self.engine].reads_deepspeed:
            engine["deepspeed"] = {"zero_optimization": {"stage": self.stage}}
        data = {"name": "digits", "micro_batch_size": self.micro_batch_size, "slots": self.slots}
        sections = {
            "model": {"name": self.model},
            "data": data | {"image_size": self.image_size},
            "optimizer": {"learning_rate": _LEARNING_RATE},
            "train": {"epochs": 1},
            "plan": {"planner": DENSE.name},
            "engine": engine,
        }
        return validated(RunConfig, sections)


@dataclass(frozen=True)
class Built:
    engine: Engine
    costs: StepCosts
    placement: Placement

    @property
    def shape(self) -> tuple[int, int]:
        """Blocks, heads."""
        return self.engine.executor.subnets.shape


def build(workload: Workload, control: Control, sides: Sequence[float] | None = None) -> Built:
    """sides: of images in plans by tokens, in units of full images; their costs are counted, too."""
    config = workload.config
    layout = RankLayout.of(
        control.world_size,
        control.rank,
        stages=workload.pipeline_stages,
        tensor_ranks=workload.tensor_parallel,
    )
    model = model_of(workload)
    executor = attach(model, compile=workload.compile, cuda_graphs=workload.cuda_graphs)
    image_shape = config.data.image_shape
    costs = measure_costs(model, executor, image_shape, sides)
    placement = Placement(
        layout,
        cut_stages(layer_flops(model, costs, image_shape), layout.stages),
        even_owner(*executor.subnets.shape, layout.tensor_ranks),
    )
    engine = build_engine(config, model, executor, placement, _STEPS, loss_of, control)
    return Built(engine, costs, placement)


def make_optimizer(model: nn.Module) -> tuple[Optimizer, LRScheduler]:
    settings = OptimizerConfig(learning_rate=_LEARNING_RATE)
    optimizer = build_optimizer(model, settings)
    return optimizer, build_schedule(optimizer, settings, _STEPS)


def model_of(workload: Workload) -> nn.Module:
    torch.manual_seed(0)
    model = build_model(workload.model, num_classes=10, options={"img_size": workload.image_size})
    return model.to(workload.device)


def batch_of(workload: Workload, rank: int) -> list[MicroBatch]:
    generator = torch.Generator().manual_seed(rank)
    shape = (workload.micro_batch_size, 3, workload.image_size, workload.image_size)
    return [
        (
            torch.randn(shape, generator=generator).to(workload.device),
            torch.randint(0, 10, shape[:1], generator=generator).to(workload.device),
        )
        for _ in range(workload.slots)
    ]


def posed(built: Built, workload: Workload, compute_budget: float) -> PlanProblem:
    """The problem of random scores."""
    placement, replicas = built.placement, built.placement.layout.replicas
    scores = np.random.default_rng(0).random((2, workload.slots * replicas, *built.shape))
    devices = Devices(replicas, placement.owner, placement.stage)
    return pose(scores, built.costs, Budgets(compute_budget), devices)


def loss_of(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), labels)


def described(workload: Workload, control: Control) -> dict[str, Any]:
    device = torch.cuda.get_device_name(workload.device) if workload.device.type == "cuda" else "cpu"
    return {
        **asdict(workload),
        "device": device,
        "ranks": control.world_size,
        "threads": torch.get_num_threads(),
    }


def title(result: Mapping[str, Any]) -> str:
    cut = "".join(
        f", {result[key]} {what}"
        for key, what in (
            ("pipeline_stages", "pipeline stages"),
            ("tensor_parallel", "tensor-parallel ranks"),
        )
        if result[key] > 1
    )
    name = f"ZeRO-{result['stage']}" if result["engine"] == "deepspeed" else result["engine"]
    return (
        f"{result['model']}, {result['image_size']} px, {result['slots']} micro-batches of "
        f"{result['micro_batch_size']}, {result['precision']}, {name}{cut}, {result['ranks']} ranks, "
        f"{result['device']}, {result['steps']} steps each in turns"
    )
