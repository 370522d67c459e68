"""Compares one micro-batch's forward and backward under a plan with the dense model: `d2ft-hpc bench step`.

Everything compared alternates in one process. On a GPU each contender is one CUDA graph, so that no kernel launch
waits for Python; the dense model is compiled as a whole. On a CPU the dense model is the faster of eager and
compiled, and the blocks that skip heads are compiled.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from d2ft_hpc.bench.turns import Ratio
from d2ft_hpc.errors import ConfigError
from d2ft_hpc.execution.attach import attach
from d2ft_hpc.execution.executor import PlanExecutor
from d2ft_hpc.families.table import family_of
from d2ft_hpc.metering import StepCosts, measure_costs
from d2ft_hpc.metering.memory import kept_bytes
from d2ft_hpc.model.build import build_model
from d2ft_hpc.model.lora import add_lora
from d2ft_hpc.planning import Operation, SkipPlan

Step = Callable[[], None]

_WARM_UPS = 3
_REPEATS, _ENOUGH_REPEATS, _ENOUGH_SECONDS = 30, 5, 120.0
"""A slow comparison, as on a CPU, ends once it has both that many seconds and that many repeats."""
_ALWAYS = (
    "layer_norm",
    "norm_backward",
    "add_norm",
    "functor_add",
    "fused_add_",
    "reduce_kernel",
    "::add",
    "mkldnn_convolution",
)
"""Parts of names of kernels and operators that run whatever heads do: norms, residuals, sums of their gradients, and,
on a CPU, the embedding of patches."""
_NO_HEADS = "norms and residuals"
_OF_HEADS = ("gelu", "nvjet", "gemm", "attention", "sdpa", "flash")
"""Parts of names of those that belong to heads although they match above."""


@dataclass(frozen=True)
class Sizes:
    """What is timed. compute, forward_only: of the plan that is drawn where `plan` names no file."""

    model: str
    micro_batch: int
    """Samples."""
    compute: float
    """Most of the dense FLOPs."""
    forward_only: float
    """Share of each block's heads that run forward only."""
    heads_multiple: int | None
    """The number of FULL heads is a multiple of it; None: of 2 on a GPU for more than 8 heads, else of 1."""
    lora_rank: int | None
    """Rank of peft's LoRA on qkv, proj, fc1 and fc2, for the dense model too; None: all weights train."""
    plan: Path | None
    image_size: int
    """Pixels."""
    device: torch.device
    dtype: torch.dtype
    repeats: int | None
    """None: as many of `_REPEATS` as are done in `_ENOUGH_SECONDS`, but at least `_ENOUGH_REPEATS`."""


@dataclass(frozen=True)
class Contender:
    """step: forward and backward of `micro_batches` micro-batches. kept_bytes: what one forward keeps for it."""

    step: Step
    kept_bytes: int
    micro_batches: int


def benchmark(
    sizes: Sizes,
    *,
    beside: Callable[[nn.Module, float], dict[str, Contender]] | None = None,
    with_profile: bool = False,
) -> dict[str, Any]:
    """The JSON object that `d2ft-hpc bench step` ends with: seconds are medians, ratios medians of pairs in turn.

    time_ideal: the share of the dense time that no head owns, from the dense run's own profile, plus the plan's share
    of the rest. flop_ideal: the plan's share of the FLOPs. efficiency, flop_efficiency: these over the ratio. Intervals
    hold the true median of the pairs with 95 % confidence. beside: makes further contenders of the dense model and the
    share of branches without gradient.
    """
    torch.manual_seed(0)
    dense = _model(sizes)
    attached = copy.deepcopy(dense)
    executor = attach(attached)
    for name, parameter in attached.named_parameters():
        dense.get_parameter(name).requires_grad_(parameter.requires_grad)
    costs = measure_costs(attached, executor, (3, sizes.image_size, sizes.image_size))
    plan = _static(sizes, costs, executor) if sizes.plan is None else SkipPlan.read(sizes.plan)
    contenders = {**_dense(sizes, dense), **_planned(sizes, dense, plan)}
    if beside is not None:
        contenders |= beside(dense, 1 - plan.shares()[Operation.FULL])
    seconds = _in_turn(contenders, sizes)
    medians = {name: float(np.median(times)) for name, times in seconds.items()}
    rival = min((name for name in medians if name.startswith("dense")), key=lambda name: medians[name])
    always = _always_share(contenders["dense_eager" if sizes.device.type == "cpu" else rival].step, sizes)
    over_rival = Ratio.of(seconds["plan"], seconds[rival])
    ratio = over_rival.median
    shares = plan.shares()
    of_heads = shares[Operation.FULL] + shares[Operation.FORWARD_ONLY] * costs.forward_share
    time_ideal = always + (1 - always) * of_heads
    found: dict[str, Any] = {
        "model": sizes.model,
        "micro_batch": sizes.micro_batch,
        "image_size": sizes.image_size,
        "device": _device_name(sizes.device),
        "dtype": str(sizes.dtype).removeprefix("torch."),
        "lora_rank": sizes.lora_rank,
        "torch": torch.__version__,
        "plan": "static" if sizes.plan is None else str(sizes.plan),
        "full_heads": np.unique((plan.operations == Operation.FULL).sum(axis=2)).tolist(),
        "full_share": shares[Operation.FULL],
        "forward_only_share": shares[Operation.FORWARD_ONLY],
        "dense": rival,
        "dense_seconds": medians[rival],
        "plan_seconds": medians["plan"],
        "ratio": ratio,
        "ratio_interval": [over_rival.low, over_rival.high],
        "always_share": always,
        "time_ideal": time_ideal,
        "flop_ideal": costs.planned_share(plan),
        "efficiency": time_ideal / ratio,
        "efficiency_interval": [time_ideal / over_rival.high, time_ideal / over_rival.low],
        "flop_efficiency": costs.planned_share(plan) / ratio,
        "full_plan_ratio": float(np.median(seconds["all_full"] / seconds[rival])),
        "dense_memory_bytes": contenders["all_full"].kept_bytes,
        "plan_memory_bytes": contenders["plan"].kept_bytes,
        "memory_ratio": contenders["plan"].kept_bytes / contenders["all_full"].kept_bytes,
        "repeats": len(seconds["plan"]),
        "seconds": medians,
    }
    if plan.binding == "slot":
        unowned = _unowned_memory_share(sizes, attached, executor, contenders["all_full"].kept_bytes)
        found["unowned_memory_share"] = unowned
        found["memory_bound"] = unowned + (1 - unowned) * shares[Operation.FULL] + 0.05
    if with_profile:
        found["profile"] = {name: _profile(contenders[name].step, sizes) for name in (rival, "plan")}
    return found


def describe(found: Mapping[str, Any]) -> str:
    """The result in a table for people."""
    lines = [
        f"{found['model']}, micro-batch {found['micro_batch']}, {found['image_size']} px, {found['dtype']}, "
        f"{found['device']}, torch {found['torch']}",
        f"plan {found['plan']}: {found['full_share']:.1%} FULL, {found['forward_only_share']:.1%} FORWARD_ONLY",
        f"{'':24}{'ms':>10}  over {found['dense']}",
        *(
            f"{name:24}{1e3 * seconds:10.3f}  {seconds / found['dense_seconds']:.3f}"
            for name, seconds in found["seconds"].items()
        ),
        f"ideal by time {found['time_ideal']:.3f}, reached {found['efficiency']:.3f} "
        f"({found['efficiency_interval'][0]:.3f} to {found['efficiency_interval'][1]:.3f}) of it; "
        f"by FLOPs {found['flop_ideal']:.3f}, reached {found['flop_efficiency']:.3f}",
        f"kept for the backward: {found['plan_memory_bytes'] / 2**20:.0f} MiB of "
        f"{found['dense_memory_bytes'] / 2**20:.0f} ({found['memory_ratio']:.3f})",
    ]
    for name, groups in found.get("profile", {}).items():
        lines.append(f"{name}, ms by kind:")
        lines += [f"    {1e3 * seconds:9.3f}  {kind}" for kind, seconds in groups.items()]
    return "\n".join(lines)


def _model(sizes: Sizes) -> nn.Module:
    model = build_model(sizes.model, num_classes=1000, options={"img_size": sizes.image_size})
    if sizes.lora_rank is not None:
        add_lora(model, rank=sizes.lora_rank, alpha=2 * sizes.lora_rank, dropout=0.0)
    if sizes.device.type == "cuda":
        family_of(model).let_graphs_capture(model)
    return model.to(device=sizes.device, dtype=sizes.dtype).train()


def _static(sizes: Sizes, costs: StepCosts, executor: PlanExecutor) -> SkipPlan:
    """A plan with as many FULL heads as fit into `compute`: each block has one of two neighbouring numbers, and which
    heads run is drawn. Planner `static` plans the same where all scores are equal.
    """
    blocks, heads = executor.subnets.shape
    forward_only = round(sizes.forward_only * heads)
    multiple = sizes.heads_multiple or (2 if sizes.device.type == "cuda" and heads > 8 else 1)
    cells = (sizes.compute * costs.dense_flops - costs.always_flops) / costs.full_flops
    groups = int((cells - blocks * forward_only * costs.forward_share) / multiple + 1e-9)
    full = np.full(blocks, groups // blocks * multiple)
    full[: groups % blocks] += multiple
    if not 1 <= full.min() <= full.max() <= heads - forward_only:
        raise ConfigError(
            f"--compute {sizes.compute} with --forward-only {sizes.forward_only} and --heads-multiple {multiple}: "
            f"{full.min()} to {full.max()} of {heads} heads would be FULL; choose them so that it is "
            f"1 to {heads - forward_only}"
        )
    generator = np.random.default_rng(0)
    operations = np.full((1, blocks, heads), Operation.SHORTCUT, np.uint8)
    for row, its_full in zip(operations[0], generator.permutation(full), strict=True):
        order = generator.permutation(heads)
        row[order[:its_full]] = Operation.FULL
        row[order[its_full : its_full + forward_only]] = Operation.FORWARD_ONLY
    return SkipPlan(operations, replicas=1)


def _dense(sizes: Sizes, model: nn.Module) -> dict[str, Contender]:
    batch = batch_of(sizes, sizes.micro_batch)
    compiled = contender(torch.compile(model, dynamic=False), model, batch, sizes)
    if sizes.device.type == "cuda":
        return {"dense": compiled}
    return {"dense_eager": contender(model, model, batch, sizes), "dense_compiled": compiled}


def _planned(sizes: Sizes, model: nn.Module, plan: SkipPlan) -> dict[str, Contender]:
    """The plan, and all FULL, each by a model of its own."""

    def under(followed: SkipPlan, samples: int) -> Contender:
        own = copy.deepcopy(model)
        executor = attach(own, compile=not followed.is_dense)
        executor.activate(followed, 0)
        forward = torch.compile(own, dynamic=False) if executor.is_dense else own
        return contender(forward, own, batch_of(sizes, samples), sizes, executor, followed.slots)

    full = SkipPlan.dense(1, 1, plan.num_blocks, plan.num_heads)
    found = {"all_full": under(full, sizes.micro_batch)}
    if plan.binding == "sample":
        chosen = max(1, round(plan.shares()[Operation.FULL] * sizes.micro_batch))
        return found | {"plan": under(full, chosen)}
    return found | {"plan": under(plan, sizes.micro_batch)}


def _unowned_memory_share(sizes: Sizes, model: nn.Module, executor: PlanExecutor, dense: int) -> float:
    """The bytes of a dense forward's kept tensors that no head owns, from forwards with one and with two FULL heads
    in each block."""
    kept = []
    for full in (1, 2):
        operations = np.full((1, *executor.subnets.shape), Operation.SHORTCUT, np.uint8)
        operations[..., :full] = Operation.FULL
        executor.activate(SkipPlan(operations, replicas=1), 0)
        with executor.micro_batch(0):
            kept.append(_kept_bytes(model, model, batch_of(sizes, sizes.micro_batch)))
    return float((2 * kept[0] - kept[1]) / dense)


def batch_of(sizes: Sizes, samples: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(samples, 3, sizes.image_size, sizes.image_size, generator=generator)
    labels = torch.randint(1000, (samples,), generator=generator)
    return images.to(sizes.device, sizes.dtype), labels.to(sizes.device)


def contender(
    forward: Callable[[Tensor], Tensor],
    model: nn.Module,
    batch: tuple[Tensor, Tensor],
    sizes: Sizes,
    executor: PlanExecutor | None = None,
    slots: int = 1,
) -> Contender:
    """slots: places of the plan, each of which runs once a step."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    at_slot = nullcontext if executor is None else executor.micro_batch

    def run() -> None:
        for slot in range(slots):
            for parameter in parameters:
                parameter.grad = None
            with at_slot(slot):
                _loss(forward(batch[0]), batch[1]).backward()

    if sizes.device.type == "cpu":
        run()
        with at_slot(0):
            return Contender(run, _kept_bytes(forward, model, batch), slots)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        with at_slot(0):
            kept = _kept_bytes(forward, model, batch)
        for _ in range(_WARM_UPS):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # One memory pool for all, since none of them needs its memory while another runs.
    with torch.cuda.graph(graph, pool=_graph_pool(), capture_error_mode="thread_local"):
        run()
    for parameter in parameters:
        parameter.grad = None

    # The captured graph reads the model and the batch, which `run` keeps, where they lie.
    def replay(captured: Step = run) -> None:
        graph.replay()

    return Contender(replay, kept, slots)


@cache
def _graph_pool() -> Any:
    return torch.cuda.graph_pool_handle()


def _kept_bytes(forward: Callable[[Tensor], Tensor], model: nn.Module, batch: tuple[Tensor, Tensor]) -> int:
    """Bytes of the tensors that a forward keeps for its backward, beside parameters and the input."""
    beside = (*model.parameters(), *model.buffers(), *batch)
    return kept_bytes(lambda: _loss(forward(batch[0]), batch[1]), beside)


def _loss(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), labels)


def _in_turn(contenders: Mapping[str, Contender], sizes: Sizes) -> dict[str, np.ndarray]:
    """Seconds of one micro-batch of each, float64 [repeat]; the order changes from round to round."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    names = list(contenders)
    # A CPU needs fewer: it has no clock to speed up, and every contender has run already.
    warm_ups = 1 if sizes.device.type == "cpu" else _WARM_UPS
    start = time.perf_counter()
    for turn in range(warm_ups + (sizes.repeats or _REPEATS)):
        is_enough = sizes.repeats is None and turn >= warm_ups + _ENOUGH_REPEATS
        if is_enough and time.perf_counter() - start > _ENOUGH_SECONDS:
            break
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            each = contenders[name]
            seconds[name].append(_timed(each.step, sizes.device) / each.micro_batches)
    return {name: np.asarray(times[warm_ups:]) for name, times in seconds.items()}


def _timed(step: Step, device: torch.device) -> float:
    if device.type == "cpu":
        start = time.perf_counter()
        step()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    step()
    end.record()
    torch.cuda.synchronize(device)
    return float(begin.elapsed_time(end)) / 1e3


def _profile(step: Step, sizes: Sizes) -> dict[str, float]:
    """Seconds by kind of what one step runs, the largest first: kernels on a GPU, operators by themselves on a CPU. The
    rest of the step is the device's waiting time."""
    on_gpu = sizes.device.type == "cuda"
    step()
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiled:
        step()
        if on_gpu:
            torch.cuda.synchronize(sizes.device)
    kinds: dict[str, float] = {}
    for event in profiled.key_averages():
        seconds = (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1e6
        kinds[_kind(event.key)] = kinds.get(_kind(event.key), 0.0) + seconds
    return dict(sorted(kinds.items(), key=lambda item: -item[1]))


def _always_share(step: Step, sizes: Sizes) -> float:
    """Share of a dense step's time that no head owns."""
    kinds = _profile(step, sizes)
    return kinds.get(_NO_HEADS, 0.0) / sum(kinds.values())


def _kind(name: str) -> str:
    name = name.lower()
    for kind, parts in _KINDS.items():
        if any(part in name for part in parts):
            return kind
    if any(part in name for part in _ALWAYS) and not any(part in name for part in _OF_HEADS):
        return _NO_HEADS
    return "other"


_KINDS: dict[str, tuple[str, ...]] = {
    "attention": ("sdpa", "flash", "fmha", "attention", "cudnn::fusion"),
    "matrix products": ("nvjet", "gemm", "splitk", "cutlass", "addmm", "::mm", "::bmm", "mkl_"),
    "GELU": ("gelu",),
    "weights by head": ("copy_heads", "index"),
    "heads joined": ("join_", "permute_stack", "catarray", "::cat"),
    "sums over tokens": ("sum_rows", "branch_backward", "red_fused_sum", "per_fused_sum"),
}


def _device_name(device: torch.device) -> str:
    return (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"CPU, {torch.get_num_threads()} threads"
    )
