"""An engine's step time: with an all-FULL plan against without us, and under a plan against dense.

Steps of what is compared alternate in one process on the same ranks, so that a busy machine slows both alike. A step
takes as long as on its slowest rank. Ratios are medians over rounds of neighbouring steps, with a 95 % bootstrap
interval. What is left is where an engine's tensors happen to lie in memory: overhead is therefore measured on two
engines of either kind, and the ratio of the two without us to each other says what the bench can tell.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from d2ft_hpc.bench.bare import bare_engine, frozen_below
from d2ft_hpc.bench.ratio import Ratio
from d2ft_hpc.config import OptimizerConfig
from d2ft_hpc.engines.ddp import DdpEngine
from d2ft_hpc.engines.deepspeed import DeepSpeedEngine, deepspeed_config
from d2ft_hpc.engines.engine import Engine, MicroBatch
from d2ft_hpc.engines.fsdp import FsdpEngine
from d2ft_hpc.engines.optimizer import build_optimizer, build_schedule
from d2ft_hpc.engines.pipeline import PipelineEngine
from d2ft_hpc.engines.plain import PlainEngine
from d2ft_hpc.engines.tensor import TensorParallelEngine
from d2ft_hpc.errors import ConfigError
from d2ft_hpc.execution.executor import attach
from d2ft_hpc.launch import Control, share
from d2ft_hpc.metering import StepCosts, measure_costs, meter
from d2ft_hpc.model.build import build_model
from d2ft_hpc.parallel.head_split import even_owner
from d2ft_hpc.parallel.layout import Layout, Placement
from d2ft_hpc.parallel.stages import cut_stages, layer_flops
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
    pipeline_stages: int = 1
    tensor_parallel: int = 1
    compile: bool = False
    cuda_graphs: bool = False
    """As `attach` takes them."""


def overhead(workload: Workload, control: Control) -> dict[str, Any]:
    """The step time with us and an all-FULL plan over that of the same DeepSpeed engine without us, beside how many
    operators and bytes of messages the steps have, in which no machine's noise is.

    Raises ConfigError if the ranks do not form whole replicas.
    """
    built = _build(workload, control)
    engine, layout = built.engine, built.placement.layout
    dense = SkipPlan.dense(workload.slots, layout.replicas, *built.shape)
    batch = _batch(workload, layout.replica)

    def with_us(built: _Built) -> Callable[[], object]:
        built.engine.executor.activate(dense, layout.replica)
        return lambda: built.engine.step(batch)

    def without() -> Callable[[], object]:
        model = frozen_below(_model(workload))
        step = bare_engine(model, built.placement, _config(workload), _make_optimizer, _loss)
        return lambda: step(batch)

    # Made in an order and, as `alternate` does, run in orders that favour neither.
    steps = {"ours": with_us(built), "bare": without(), "other bare": without()}
    steps["other ours"] = with_us(_build(workload, control))
    seconds = alternate(steps, workload.steps, workload.device, control)
    lookups = engine.executor.lookup_seconds / (workload.steps + _WARM_UP)
    counted = {}
    for name in ("ours", "bare"):
        with meter() as metered:
            steps[name]()
        counted[name] = {"operators": metered.operators, "bytes_sent": metered.bytes_sent}
    start = time.perf_counter()
    plan = share(control, lambda: _solved(built, workload, "joint", 0.6).to_bytes(), "the plan")
    engine.executor.activate(SkipPlan.from_bytes(plan), layout.replica)
    planning = time.perf_counter() - start
    bare = seconds["bare"] + seconds["other bare"]
    return {
        **_described(workload, control),
        "bare_seconds": float(np.median(bare)) / 2,
        "ours_over_bare": asdict(Ratio.of(seconds["ours"] + seconds["other ours"], bare)),
        "bare_over_bare": asdict(Ratio.of(seconds["other bare"], seconds["bare"])),
        "counted": counted,
        "lookup_seconds_a_step": lookups,
        "planning_seconds_a_plan": planning,
        "seconds": {name: of_name.tolist() for name, of_name in seconds.items()},
    }


def overhead_report(result: Mapping[str, Any]) -> str:
    ours, bare = result["counted"]["ours"], result["counted"]["bare"]
    return "\n".join(
        [
            _title(result),
            f"step without us          {1e3 * result['bare_seconds']:9.2f} ms",
            f"step with an all-FULL plan over that   {Ratio(**result['ours_over_bare'])}",
            f"another engine without us over that    {Ratio(**result['bare_over_bare'])}",
            f"operators of a step      {ours['operators']:9d} with us, {bare['operators']} without",
            f"bytes sent in a step     {sum(ours['bytes_sent'].values()):9d} with us, "
            f"{sum(bare['bytes_sent'].values())} without",
            f"looking the plan up      {1e6 * result['lookup_seconds_a_step']:9.0f} us a step",
            f"planning                 {1e6 * result['planning_seconds_a_plan']:9.0f} us a plan (joint, solved, sent, "
            f"loaded)",
        ]
    )


def speed(workload: Workload, control: Control, planner: str, compute_budget: float) -> dict[str, Any]:
    """The step time under a plan over the dense one, beside what the plan promises, of an engine whose ranks hold the
    whole model each (`d2ft_hpc.bench.parallel` is for the others)."""
    built = _build(workload, control)
    engine, costs = built.engine, built.costs
    shape = (workload.slots * control.world_size, *built.shape)
    made = share(control, lambda: _solved(built, workload, planner, compute_budget).to_bytes(), "the plan")
    plan = SkipPlan.from_bytes(made)
    nothing = SkipPlan(np.full(shape, Operation.SHORTCUT, dtype=np.uint8), control.world_size)
    dense = SkipPlan.dense(workload.slots, control.world_size, *shape[1:])
    batch = _batch(workload, control.rank)

    plans = {"dense": dense, "plan": plan, "nothing": nothing}
    steps: dict[str, Callable[[], object]] = {name: lambda: engine.step(batch) for name in plans}
    plain = _plain(workload)
    steps["plain"] = lambda: plain.step(batch)

    def before(name: str) -> None:
        if name in plans:
            engine.executor.activate(plans[name], control.rank)

    seconds = alternate(steps, workload.steps, workload.device, control, before)
    always = float(np.median(seconds["nothing"] / seconds["dense"]))
    by_replica = [
        (costs.planned_flops(plan.for_replica(r)).sum() / workload.slots - costs.always_flops)
        / (costs.dense_flops - costs.always_flops)
        for r in range(control.world_size)
    ]
    return {
        **_described(workload, control),
        "planner": planner,
        "compute_budget": compute_budget,
        "dense_seconds": float(np.median(seconds["dense"])),
        "dense_over_plain": asdict(Ratio.of(seconds["dense"], seconds["plain"])),
        "images_per_second": workload.slots
        * workload.micro_batch_size
        * control.world_size
        / float(np.median(seconds["plan"])),
        "plan_over_dense": asdict(Ratio.of(seconds["plan"], seconds["dense"])),
        "promised_by_flops": costs.planned_share(plan),
        "always_share": always,
        "promised_by_time": always + (1 - always) * max(by_replica),
        "lookup_seconds": engine.executor.lookup_seconds,
        "bytes_sent": {name: _bytes_sent(built, batch, plans[name], control) for name in ("dense", "plan")},
        "seconds": {name: of_name.tolist() for name, of_name in seconds.items()},
    }


def speed_report(result: Mapping[str, Any]) -> str:
    return "\n".join(
        [
            _title(result),
            f"dense step               {1e3 * result['dense_seconds']:9.2f} ms",
            f"  over one process's with the same samples and no engine  {Ratio(**result['dense_over_plain'])}",
            f"plan ({result['planner']}, {result['compute_budget']:.0%}): step over the dense one  "
            f"{Ratio(**result['plan_over_dense'])}",
            f"images under the plan    {result['images_per_second']:9.0f} a second, all ranks",
            f"promised by FLOPs        {result['promised_by_flops']:9.4f}",
            f"promised by time         {result['promised_by_time']:9.4f}  (what always runs, measured at "
            f"{result['always_share']:.4f}, plus the busiest replica's share of the rest)",
            *(
                f"{name + ', bytes a step':25s}{result['bytes_sent']['plan'].get(name, 0):9d} of {sent} dense"
                for name, sent in result["bytes_sent"]["dense"].items()
            ),
        ]
    )


def _bytes_sent(built: _Built, batch: list[MicroBatch], plan: SkipPlan, control: Control) -> dict[str, int]:
    """What a rank sends in a step, by collective, counted where it is issued."""
    built.engine.executor.activate(plan, control.rank)
    with meter() as metered:
        built.engine.step(batch)
    return dict(metered.bytes_sent)


_WARM_UP = 3


def alternate(
    steps: Mapping[str, Callable[[], object]],
    count: int,
    device: torch.device,
    control: Control | None = None,
    before: Callable[[str], object] = lambda name: None,
    warm_up: int = _WARM_UP,
) -> dict[str, np.ndarray]:
    """Seconds of `count` steps of each by name on the slowest rank, float64 [step]. From round to round the order is
    turned round, and after two rounds begins with the next: each is as often early as late.

    control: of the ranks that begin each step together; None: there is one. before: what is done before the clock
    starts. warm_up: rounds before those that are measured. Raises ConfigError for less than 2 steps.
    """
    if count < 2:
        raise ConfigError(
            f"{count} measured steps of each have no interval: measure at least 2, or better 20"
        )
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    for turn in range(warm_up + count):
        first = turn // 2 % len(names)
        for name in (names[first:] + names[:first])[:: -1 if turn % 2 else 1]:
            before(name)
            _synchronize(device)
            if control is not None:
                control.barrier(60)
            start = time.perf_counter()
            steps[name]()
            _synchronize(device)
            seconds[name].append(time.perf_counter() - start)
    own = np.array([of_name[warm_up:] for of_name in seconds.values()])
    if control is None:
        return dict(zip(names, own, strict=True))
    of_ranks = [np.frombuffer(part).reshape(own.shape) for part in control.all_gather(own.tobytes())]
    return dict(zip(names, np.max(of_ranks, axis=0), strict=True))


@dataclass(frozen=True)
class _Built:
    engine: Engine
    costs: StepCosts
    placement: Placement

    @property
    def shape(self) -> tuple[int, int]:
        """Blocks, heads."""
        return self.engine.executor.subnets.shape


def _build(workload: Workload, control: Control) -> _Built:
    layout = Layout.of(
        control.world_size,
        control.rank,
        stages=workload.pipeline_stages,
        tensor_ranks=workload.tensor_parallel,
    )
    model = _model(workload)
    executor = attach(model, compile=workload.compile, cuda_graphs=workload.cuda_graphs)
    image_shape = (3, workload.image_size, workload.image_size)
    costs = measure_costs(model, executor, image_shape)
    placement = Placement(
        layout,
        cut_stages(layer_flops(model, costs, image_shape), layout.stages),
        even_owner(*executor.subnets.shape, layout.tensor_ranks),
    )
    config = _config(workload)
    low_dtype = torch.bfloat16 if workload.precision == "bf16" else None
    engine: Engine
    if layout.is_cut:
        kind = PipelineEngine if layout.stages > 1 else TensorParallelEngine
        engine = kind(model, executor, placement, _make_optimizer, _loss, config, control)
    elif workload.engine == "deepspeed":
        engine = DeepSpeedEngine(model, executor, *_make_optimizer(model), _loss, config)
    elif workload.engine == "ddp":
        engine = DdpEngine(model, executor, *_make_optimizer(model), _loss, autocast_dtype=low_dtype)
    else:
        engine = FsdpEngine(model, executor, placement, _make_optimizer, _loss, param_dtype=low_dtype)
    return _Built(engine, costs, placement)


def _plain(workload: Workload) -> PlainEngine:
    """One process's dense training, each rank for itself: what the engines' own work is measured against."""
    model = _model(workload)
    executor = attach(model, compile=workload.compile)
    return PlainEngine(
        model,
        executor,
        *_make_optimizer(model),
        _loss,
        autocast_dtype=torch.bfloat16 if workload.precision == "bf16" else None,
        cuda_graphs=workload.cuda_graphs,
    )


def _make_optimizer(model: VisionTransformer) -> tuple[Optimizer, LRScheduler]:
    settings = OptimizerConfig(learning_rate=1e-4)
    optimizer = build_optimizer(model, settings)
    return optimizer, build_schedule(optimizer, settings, 10**6)


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
    model = build_model(workload.model, num_classes=10, options={"img_size": workload.image_size})
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


def _solved(built: _Built, workload: Workload, planner: str, compute_budget: float) -> SkipPlan:
    """A plan for random scores."""
    layout = built.placement.layout
    scores = np.random.default_rng(0).random((2, workload.slots * layout.replicas, *built.shape))
    problem = PlanProblem.parallel(
        *scores,
        replicas=layout.replicas,
        rank=built.placement.owner,
        stage=built.placement.stage,
        compute_budget=compute_budget,
        forward_cost=built.costs.forward_share,
        always_share=built.costs.always_share,
    )
    return solve(problem, planner)


def _loss(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), labels)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _described(workload: Workload, control: Control) -> dict[str, Any]:
    device = torch.cuda.get_device_name(workload.device) if workload.device.type == "cuda" else "cpu"
    return {
        **asdict(workload),
        "device": device,
        "ranks": control.world_size,
        "threads": torch.get_num_threads(),
    }


def _title(result: Mapping[str, Any]) -> str:
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
