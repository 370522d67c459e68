"""An engine's step time: with an all-FULL plan against without us, and under a plan against dense.

Steps of what is compared alternate in one process on the same ranks, so that a busy machine slows both alike. Ratios
are medians over pairs of neighbouring steps, with a 95 % bootstrap interval.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from scipy.stats import bootstrap
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from d2ft_hpc.config import OptimizerConfig
from d2ft_hpc.engines.ddp import DdpEngine
from d2ft_hpc.engines.deepspeed import DeepSpeedEngine, deepspeed_config
from d2ft_hpc.engines.deepspeed_private import import_deepspeed
from d2ft_hpc.engines.engine import Engine, MicroBatch
from d2ft_hpc.engines.fsdp import FsdpEngine
from d2ft_hpc.engines.optimizer import build_optimizer, build_schedule
from d2ft_hpc.execution.executor import attach
from d2ft_hpc.launch import Control, share
from d2ft_hpc.metering import StepCosts, measure_costs, meter
from d2ft_hpc.parallel.head_split import even_owner
from d2ft_hpc.parallel.layout import Layout, Placement
from d2ft_hpc.planning import PlanProblem, SkipPlan, solve
from d2ft_hpc.planning.plan import Operation


@dataclass(frozen=True)
class Workload:
    model: str
    image_size: int
    micro_batch_size: int
    slots: int
    engine: str
    """deepspeed, ddp or fsdp2."""
    stage: int
    """Of ZeRO."""
    precision: str
    steps: int
    """Measured steps of each of the things compared."""
    device: torch.device


@dataclass(frozen=True)
class Ratio:
    """Of step times; the interval holds the true median with 95 % confidence."""

    median: float
    low: float
    high: float

    @staticmethod
    def of(seconds: np.ndarray, baseline: np.ndarray) -> Ratio:
        """seconds, baseline: float64 [step], measured in turns."""
        ratios = seconds / baseline
        found = bootstrap((ratios,), np.median, confidence_level=0.95, method="percentile", rng=0)
        interval = found.confidence_interval
        return Ratio(float(np.median(ratios)), float(interval.low), float(interval.high))

    def __str__(self) -> str:
        return f"{self.median:.4f} (95 %: {self.low:.4f} to {self.high:.4f})"


def overhead(workload: Workload, control: Control) -> str:
    """The step time with us and an all-FULL plan over that of the same DeepSpeed engine without us."""
    engine, costs = _engine(workload, control)
    dense = SkipPlan.dense(workload.slots, control.world_size, *engine.executor.subnets.shape)
    engine.executor.load(dense, control.rank)
    bare = _bare_engine(workload)
    batch = _batch(workload, control.rank)
    before = engine.executor.lookup_seconds

    def without_us() -> None:
        for images, labels in batch:
            bare.backward(_loss(bare(images.to(_dtype(bare.module))).float(), labels))
            bare.step()

    seconds = alternate(
        {"ours": lambda: engine.step(batch), "bare": without_us}, workload.steps, workload.device, control
    )
    lookups = (engine.executor.lookup_seconds - before) / (workload.steps + _WARM_UP)
    start = time.perf_counter()
    plan = share(
        control, lambda: _solved(costs, engine, workload, control, "joint", 0.6).to_bytes(), "the plan"
    )
    engine.executor.load(SkipPlan.from_bytes(plan), control.rank)
    planning = time.perf_counter() - start
    return "\n".join(
        [
            _title(workload, control),
            f"step without us          {1e3 * float(np.median(seconds['bare'])):9.2f} ms",
            f"step with an all-FULL plan over that   {Ratio.of(seconds['ours'], seconds['bare'])}",
            f"looking the plan up      {1e6 * lookups:9.0f} us a step",
            f"planning                 {1e6 * planning:9.0f} us a plan (joint, solved, sent, loaded)",
        ]
    )


def speed(workload: Workload, control: Control, planner: str, compute_budget: float) -> str:
    """The step time under a plan over the dense one, beside what the plan promises."""
    engine, costs = _engine(workload, control)
    shape = (workload.slots * control.world_size, *engine.executor.subnets.shape)
    made = share(
        control,
        lambda: _solved(costs, engine, workload, control, planner, compute_budget).to_bytes(),
        "the plan",
    )
    plan = SkipPlan.from_bytes(made)
    nothing = SkipPlan(np.full(shape, Operation.SHORTCUT, dtype=np.uint8), control.world_size)
    dense = SkipPlan.dense(workload.slots, control.world_size, *shape[1:])
    batch = _batch(workload, control.rank)

    def step_under(followed: SkipPlan) -> Callable[[], object]:
        def step() -> object:
            if engine.executor.plan is not followed:
                engine.executor.load(followed, control.rank)
            return engine.step(batch)

        return step

    plans = {"dense": dense, "plan": plan, "nothing": nothing}
    steps = {name: step_under(which) for name, which in plans.items()}
    seconds = alternate(steps, workload.steps, workload.device, control)
    always = float(np.median(seconds["nothing"] / seconds["dense"]))
    by_replica = [
        (costs.planned_flops(plan.for_replica(r)).sum() / workload.slots - costs.always_flops)
        / (costs.dense_flops - costs.always_flops)
        for r in range(control.world_size)
    ]
    return "\n".join(
        [
            _title(workload, control),
            f"dense step               {1e3 * float(np.median(seconds['dense'])):9.2f} ms",
            f"plan ({planner}, {compute_budget:.0%}): step over the dense one  "
            f"{Ratio.of(seconds['plan'], seconds['dense'])}",
            f"promised by FLOPs        {costs.planned_share(plan):9.4f}",
            f"promised by time         {always + (1 - always) * max(by_replica):9.4f}  "
            f"(what always runs, measured at {always:.4f}, plus the busiest replica's share of the rest)",
            *_bytes_sent(step_under(dense), step_under(plan)),
        ]
    )


def _bytes_sent(dense_step: Callable[[], object], planned_step: Callable[[], object]) -> list[str]:
    """What a rank sends in a step, by collective, counted where it is issued."""
    with meter() as dense:
        dense_step()
    with meter() as planned:
        planned_step()
    return [
        f"{name + ', bytes a step':25s}{planned.bytes_sent.get(name, 0):9d} of {sent} dense"
        for name, sent in dense.bytes_sent.items()
    ]


_WARM_UP = 3


def alternate(
    steps: Mapping[str, Callable[[], object]],
    count: int,
    device: torch.device,
    control: Control | None = None,
) -> dict[str, np.ndarray]:
    """Seconds of `count` steps of each by name, float64 [step]; the order changes from round to round.

    control: of the ranks that begin each step together; None: there is one.
    """
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    for turn in range(count + _WARM_UP):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            _synchronize(device)
            if control is not None:
                control.barrier(60)
            start = time.perf_counter()
            steps[name]()
            _synchronize(device)
            seconds[name].append(time.perf_counter() - start)
    return {name: np.asarray(of_name[_WARM_UP:]) for name, of_name in seconds.items()}


def _engine(workload: Workload, control: Control) -> tuple[Engine, StepCosts]:
    model = _model(workload)
    executor = attach(model)
    costs = measure_costs(model, executor, (3, workload.image_size, workload.image_size))

    def make_optimizer(part: VisionTransformer) -> tuple[Optimizer, LRScheduler]:
        settings = OptimizerConfig(learning_rate=1e-4)
        optimizer = build_optimizer(part, settings)
        return optimizer, build_schedule(optimizer, settings, 10**6)

    low_dtype = torch.bfloat16 if workload.precision == "bf16" else None
    if workload.engine == "deepspeed":
        engine: Engine = DeepSpeedEngine(model, executor, *make_optimizer(model), _loss, _config(workload))
    elif workload.engine == "ddp":
        engine = DdpEngine(model, executor, *make_optimizer(model), _loss, autocast_dtype=low_dtype)
    else:
        blocks, heads = executor.subnets.shape
        layout = Layout.of(control.world_size, control.rank)
        placement = Placement(layout, [range(blocks)], even_owner(blocks, heads, 1))
        engine = FsdpEngine(model, executor, placement, make_optimizer, _loss, param_dtype=low_dtype)
    return engine, costs


def _bare_engine(workload: Workload) -> Any:
    """DeepSpeed alone, with the same parameters frozen."""
    model = _model(workload)
    for name, parameter in model.named_parameters():
        if name.startswith(("patch_embed", "pos_embed", "cls_token", "reg_token", "norm_pre")):
            parameter.requires_grad_(False)
    settings = OptimizerConfig(learning_rate=1e-4)
    optimizer = build_optimizer(model, settings)
    engine, *_ = import_deepspeed().initialize(
        model=model,
        model_parameters=[parameter for parameter in model.parameters() if parameter.requires_grad],
        optimizer=optimizer,
        lr_scheduler=build_schedule(optimizer, settings, 10**6),
        config=_config(workload),
    )
    engine.train()
    return engine


def _config(workload: Workload) -> dict[str, Any]:
    return deepspeed_config(
        {"zero_optimization": {"stage": workload.stage}},
        micro_batch_size=workload.micro_batch_size,
        slots=workload.slots,
        precision=workload.precision,
        gradient_clipping=None,
    )


def _model(workload: Workload) -> VisionTransformer:
    torch.manual_seed(0)
    model = timm.create_model(workload.model, img_size=workload.image_size, num_classes=10)
    return model.to(workload.device)


def _batch(workload: Workload, rank: int) -> list[MicroBatch]:
    generator = torch.Generator().manual_seed(rank)
    shape = (workload.micro_batch_size, 3, workload.image_size, workload.image_size)
    return [
        (
            torch.randn(shape, generator=generator).to(workload.device),
            torch.randint(0, 10, shape[:1], generator=generator).to(workload.device),
        )
        for _ in range(workload.slots)
    ]


def _solved(
    costs: StepCosts,
    engine: Engine,
    workload: Workload,
    control: Control,
    planner: str,
    compute_budget: float,
) -> SkipPlan:
    """A plan for random scores."""
    shape = (workload.slots * control.world_size, *engine.executor.subnets.shape)
    scores = np.random.default_rng(0).random((2, *shape))
    problem = PlanProblem.parallel(
        scores[0],
        scores[1],
        replicas=control.world_size,
        compute_budget=compute_budget,
        forward_cost=costs.forward_share,
        always_share=costs.always_share,
    )
    return solve(problem, planner)  # type: ignore[arg-type]


def _loss(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), labels)


def _dtype(model: torch.nn.Module) -> torch.dtype:
    return next(model.parameters()).dtype


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _title(workload: Workload, control: Control) -> str:
    name = f"ZeRO-{workload.stage}" if workload.engine == "deepspeed" else workload.engine
    return (
        f"{workload.model}, {workload.image_size} px, {workload.slots} micro-batches of {workload.micro_batch_size}, "
        f"{workload.precision}, {name}, {control.world_size} ranks, {workload.device.type}, "
        f"{workload.steps} steps each in turns"
    )
