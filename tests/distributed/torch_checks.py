"""Run under a launcher: each check trains through DDP or FSDP2 and compares with one process; rank 0 prints JSON.

    mpirun -n 2 python -m tests.distributed.torch_checks CHOICE [--only WORDS]

A check's result is the largest difference of any parameter, or a dict of facts; the tests judge them.
"""

from __future__ import annotations

import copy
import pickle
import sys
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import timm.utils
import torch
from safetensors.torch import load_file
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

import d2ft_hpc
from d2ft_hpc.engines.ddp import DdpEngine
from d2ft_hpc.engines.fsdp import KEPT_BYTES, FsdpEngine, shard
from d2ft_hpc.engines.plain import PlainEngine
from d2ft_hpc.engines.planned_bytes import PlannedBytes
from d2ft_hpc.engines.portable import write_file
from d2ft_hpc.engines.sharded import load_sharded, save_sharded, whole_weights
from d2ft_hpc.errors import CheckpointError, ConfigError, D2ftError, PlanError, UnsupportedModelError
from d2ft_hpc.execution.attach import attach
from d2ft_hpc.launch import Control
from d2ft_hpc.metering import meter
from d2ft_hpc.model.lora import add_lora
from d2ft_hpc.parallel.dtensor import split_heads
from d2ft_hpc.parallel.rank_layout import Placement, RankLayout
from d2ft_hpc.planning import SkipPlan
from d2ft_hpc.planning.samples import SampleOptions
from d2ft_hpc.selection.build import selection_of
from tests.distributed.engine_checks import (
    EPSILON,
    SLOTS,
    STEPS,
    deepspeed_engine,
    largest_difference,
    loss_function,
    micro_batch,
    optimizer_maker,
    plan_of,
    run_checks,
    trained_alone,
)
from tests.distributed.launching import Choice
from tests.models import CLASSES, DEPTH, HEADS, random_batch, tiny, tiny_vit

Engine = DdpEngine | FsdpEngine
UNEVEN_ORDER = np.array([[0, 1, 0, 1], [1, 0, 0, 1], [0, 0, 1, 1], [1, 1, 0, 0]])
"""Equal numbers of heads on 2 tensor ranks, in other orders in each block."""


def model_for(engine: str, optimizer: str, lora: bool) -> VisionTransformer:
    """A key bias has a gradient of zero, except for rounding, which AdamW would turn into steps of full size."""
    heads = {"num_heads": 4} if "tp" in engine else {}
    model = tiny_vit(qkv_bias=optimizer == "sgd", qk_norm="tp" in engine, **heads)
    return with_lora(model) if lora else model


def with_lora(model: VisionTransformer) -> VisionTransformer:
    add_lora(model, rank=2, alpha=3, dropout=0.0)
    torch.manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.1)
    return model


def plan_for(engine: str, kind: str, step: int, replicas: int) -> SkipPlan:
    plan = plan_of(kind, step, replicas)
    if "tp" not in engine:
        return plan
    rng = np.random.default_rng((9, step))  # a fourth head
    fourth = plan.operations[:, :, :1] if kind in ("full", "whole blocks") else None
    more = rng.integers(0, 3, (plan.num_rows, DEPTH, 1)).astype(np.uint8) if fourth is None else fourth
    return replace(plan, operations=np.concatenate([plan.operations, more], axis=2))


def layout_of(control: Control, engine: str) -> RankLayout:
    return RankLayout.of(control.world_size, control.rank, tensor_ranks=2 if "tp" in engine else 1)


def build(
    control: Control,
    engine: str,
    model: VisionTransformer,
    optimizer_name: str,
    precision: str = "fp32",
    clipping: float | None = None,
    embeddings: str = "frozen",
) -> Engine:
    executor = attach(model, embeddings=embeddings)
    dtype = torch.bfloat16 if precision == "bf16" else None

    make_optimizer = optimizer_maker(optimizer_name, EPSILON[precision])

    if engine == "ddp":
        return DdpEngine(
            model,
            executor,
            *make_optimizer(model),
            loss_function,
            autocast_dtype=dtype,
            gradient_clipping=clipping,
        )
    layout = layout_of(control, engine)
    owner = UNEVEN_ORDER if layout.is_cut else np.zeros((DEPTH, HEADS), dtype=np.int64)
    return FsdpEngine(
        model,
        executor,
        Placement(layout, [range(DEPTH)], owner),
        make_optimizer,
        loss_function,
        param_dtype=dtype,
        gradient_clipping=clipping,
        kept_bytes=0 if optimizer_name == "sgd" else KEPT_BYTES,  # either way
    )


def step_with(control: Control, engine: Engine, name: str, kind: str, step: int) -> None:
    layout = layout_of(control, name)
    plan = plan_for(name, kind, step, layout.replicas)
    engine.check(plan)
    engine.executor.activate(plan, layout.replica)
    rows = [slot * layout.replicas + layout.replica for slot in range(SLOTS)]
    engine.step([micro_batch(step, row, plan.num_rows) for row in rows])


def weights_of(engine: Engine) -> dict[str, torch.Tensor]:
    with engine.full_model() as full:
        return {name: parameter.detach().clone() for name, parameter in full.named_parameters()}


def trained(
    control: Control, engine: Engine, name: str, kind: str, steps: range = range(STEPS)
) -> dict[str, torch.Tensor]:
    for step in steps:
        step_with(control, engine, name, kind, step)
    return weights_of(engine)


def reference(
    name: str,
    kind: str,
    optimizer_name: str,
    replicas: int,
    *,
    lora: bool = False,
    clipping: float | None = None,
    embeddings: str = "frozen",
    double: bool = False,
    precision: str = "fp32",
) -> dict[str, torch.Tensor]:
    """What one process gets from the same rows, in fp32 or fp64; `precision` is that of the ranks."""
    model = model_for(name, optimizer_name, lora)
    model = model.double() if double else model
    plans = [plan_for(name, kind, step, replicas) for step in range(STEPS)]
    make = optimizer_maker(optimizer_name, EPSILON[precision])
    trained = trained_alone(model, plans, make, clipping, embeddings)
    return {name: parameter.detach() for name, parameter in trained.items()}


def check_fp32(
    control: Control,
    engine: str,
    kind: str,
    optimizer: str,
    lora: bool = False,
    clipping: float | None = None,
    recompute: bool = False,
    embeddings: str = "frozen",
) -> dict[str, float]:
    """Largest difference from one process; where it is not 1e-6, both runs' from fp64: what rounding alone does."""
    model = model_for(engine, optimizer, lora)
    model.set_grad_checkpointing(recompute)
    built = build(control, engine, model, optimizer, clipping=clipping, embeddings=embeddings)
    own = trained(control, built, engine, kind)
    replicas = layout_of(control, engine).replicas
    options: Any = {"lora": lora, "clipping": clipping, "embeddings": embeddings}
    one = reference(engine, kind, optimizer, replicas, **options)
    difference = largest_difference(own, one)
    if difference <= 1e-6:
        return {"difference": difference}
    exact = reference(engine, kind, optimizer, replicas, double=True, **options)
    return {
        "difference": difference,
        "own error": largest_difference(own, exact),
        "one process's error": largest_difference(one, exact),
    }


def check_bf16(
    control: Control, engine: str, kind: str, optimizer: str, lora: bool = False
) -> dict[str, float]:
    """Root-mean-square distance from fp64, of the plan and of the dense model under the same engine."""
    replicas = layout_of(control, engine).replicas

    def error(of_kind: str) -> float:
        built = build(control, engine, model_for(engine, optimizer, lora), optimizer, precision="bf16")
        own = trained(control, built, engine, of_kind)
        exact = reference(engine, of_kind, optimizer, replicas, lora=lora, double=True, precision="bf16")
        squares = [(own[name].double() - exact[name]).square().flatten() for name in exact]
        return float(torch.cat(squares).mean().sqrt())

    return {"plan": error(kind), "dense": error("full")}


def check_user_loop(
    control: Control,
    how: str,
    kind: str = "random",
    optimizer: str = "sgd",
    reduced_in: str = "every",
    last_slots: int = SLOTS,
    hsdp: bool = False,
    recompute: bool = False,
    compiled: str = "",
    built_on: str = "cpu",
) -> float:
    """A loop of the user's own; `reduced_in` "last" accumulates without reducing, "last, between nodes" reduces within
    each row of an HSDP mesh before. last_slots: micro-batches of the last step; fewer than of the others is an epoch's
    incomplete group, whose last one reduces. built_on: "meta": the model gets its memory once it is spread."""
    replicas, rank = control.world_size, control.rank
    make_optimizer = optimizer_maker(optimizer, EPSILON["fp32"])
    model = tiny_vit(qkv_bias=optimizer == "sgd").to(built_on)
    model.set_grad_checkpointing(recompute)
    executor = attach(model, compile=compiled == "blocks")
    trainer: nn.Module = model
    if how == "ddp":
        trainer = DistributedDataParallel(model)
    else:
        shape = (2, replicas // 2) if hsdp else (replicas,)
        shard(model, init_device_mesh("cpu", shape, mesh_dim_names=("replica", "shard")[: len(shape)]))
    if built_on == "meta":
        model.to_empty(device="cpu")
        weights: Any = tiny_vit(qkv_bias=optimizer == "sgd").state_dict()
        set_model_state_dict(model, weights, options=StateDictOptions(full_state_dict=True))
    d2ft_hpc.prepare(trainer, executor)
    if how == "ddp":
        average = timm.utils.ModelEmaV3(trainer)
        assert not hasattr(average.module.module.blocks[0], "_d2ft")
    if compiled == "model":
        trainer = torch.compile(trainer, backend="aot_eager")  # what its kernels compute is not ours
    own_optimizer, own_schedule = make_optimizer(model)
    for step in range(STEPS):
        executor.activate(plan_of(kind, step, replicas), replica=rank)
        slots = SLOTS if step < STEPS - 1 else last_slots
        for slot in range(slots):
            images, labels = micro_batch(step, slot * replicas + rank, SLOTS * replicas)
            accumulates = reduced_in.startswith("last") and slot < slots - 1
            if isinstance(model, FSDPModule) and reduced_in == "last, between nodes":
                model.set_requires_all_reduce(not accumulates)
            elif isinstance(model, FSDPModule):
                model.set_requires_gradient_sync(not accumulates)
            with (
                trainer.no_sync() if accumulates and how == "ddp" else nullcontext(),
                executor.micro_batch(slot),
            ):
                (loss_function(trainer(images), labels) / slots).backward()
        own_optimizer.step()
        own_schedule.step()
        own_optimizer.zero_grad()
    own = whole_weights(model, executor) if isinstance(model, FSDPModule) else dict(model.named_parameters())
    plain = tiny_vit(qkv_bias=optimizer == "sgd")
    plain_executor = attach(plain)
    engine = PlainEngine(plain, plain_executor, *make_optimizer(plain), loss_function)
    for step in range(STEPS):
        plan = plan_of(kind, step, replicas)
        plain_executor.activate(replace(plan, replicas=1), 0)
        rows = (SLOTS if step < STEPS - 1 else last_slots) * replicas
        engine.step([micro_batch(step, row, plan.num_rows) for row in range(rows)])
    return largest_difference(own, dict(plain.named_parameters()))


def check_attached_loop(control: Control, how: str, sharing: str = "every") -> dict[str, Any]:
    """A loop in which `attach` does all: the first batch gives the scores, and a state resumes it on other weights.

    Difference from one process that follows the same plans; whether all ranks have the same ones; the state's loss less
    the uninterrupted one's; planner samples' draw, equal to that of the model by itself."""
    replicas, rank = control.world_size, control.rank

    def spread(seed: int, **settings: Any) -> tuple[Any, Any, nn.Module]:
        model = tiny_vit(seed, qkv_bias=False)
        d2ft = d2ft_hpc.attach(model, micro_batches=SLOTS, **settings)
        if how == "ddp":
            return model, d2ft, DistributedDataParallel(model)
        shard(model, init_device_mesh("cpu", (replicas,)))
        return model, d2ft, model

    def step(model: Any, trainer: nn.Module, optimizer: Any, number: int) -> float:
        for slot in range(SLOTS):
            images, labels = micro_batch(number, slot * replicas + rank, SLOTS * replicas)
            waits = how == "ddp" and sharing == "last" and slot < SLOTS - 1
            with trainer.no_sync() if waits else nullcontext():  # type: ignore[operator]
                loss = loss_function(trainer(images), labels) / SLOTS
                loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    planned = {"planner": "joint", "replan": {"every": "2 steps"}}
    model, d2ft, trainer = spread(0, **planned)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    plain = tiny_vit(qkv_bias=False)
    plain_executor = attach(plain)
    plain_optimizer = torch.optim.SGD([p for p in plain.parameters() if p.requires_grad], lr=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(plain_optimizer, lambda _: 1.0)
    engine = PlainEngine(plain, plain_executor, plain_optimizer, schedule, loss_function)
    hashes: list[str] = []
    for number in range(4):
        plan = d2ft.plan or SkipPlan.dense(SLOTS, replicas, DEPTH, HEADS)
        hashes.append(plan.hash)
        last = step(model, trainer, optimizer, number)
        plain_executor.activate(replace(plan, replicas=1), 0)
        engine.step([micro_batch(number, row, SLOTS * replicas) for row in range(SLOTS * replicas)])
        if number == 2:
            state = d2ft.state_dict()
            weights = (
                whole_weights(model, d2ft.executor) if how == "fsdp2" else copy.deepcopy(model.state_dict())
            )
    own = whole_weights(model, d2ft.executor) if how == "fsdp2" else dict(model.named_parameters())
    other, resumed, trainer = spread(1, **planned)
    set_model_state_dict(other, weights, options=StateDictOptions(full_state_dict=True))
    resumed.load_state_dict(state)
    again = step(other, trainer, torch.optim.SGD(other.parameters(), lr=0.1), 3)
    model, d2ft, _ = spread(0, planner="samples", compute_budget=0.7)
    images, labels = micro_batch(0, rank, replicas)
    images, labels = images.repeat(4, 1, 1, 1), labels.repeat(4)
    chosen, _ = d2ft.choose(images, labels)
    twin = selection_of(SampleOptions(), tiny_vit(qkv_bias=False), (3, 16, 16), seed=0, replica=rank)
    (alone,) = twin([(images, labels)], 0, len(chosen) / len(images))
    told = [part.decode() for part in control.all_gather(" ".join(hashes).encode())]
    return {
        "difference": largest_difference(own, dict(plain.named_parameters())),
        "plans": hashes,
        "agreed": len(set(told)) == 1,
        "resumed": abs(again - last),
        "same draw": bool(torch.equal(chosen, alone[0])),
    }


def check_gathered_bytes(control: Control, optimizer: str) -> dict[str, Any]:
    """Bytes of one step, dense and where some blocks are SHORTCUT for all replicas; and by the message model."""
    model = tiny_vit()
    engine = build(control, "fsdp2", model, optimizer)
    shape = (SLOTS * control.world_size, DEPTH, HEADS)
    plans = {"dense": np.full(shape, 2, np.uint8), "half": np.full(shape, 2, np.uint8)}
    plans["half"][: control.world_size, 1:] = 0  # first micro-batch: one block of four
    plans["half"][control.world_size :, 2] = 0  # second: three
    plans["half"][-1, 3] = 0  # skipped by one replica alone: gathered
    plans["two blocks"] = plans["dense"].copy()
    plans["two blocks"][:, 2:] = 0
    plans["forward only"] = np.where(plans["half"] == 2, 1, 0).astype(np.uint8)
    told = PlannedBytes(
        model,
        engine.executor,
        SimpleNamespace(
            placement=Placement.whole(control.world_size, control.rank, DEPTH, HEADS),
            slots=SLOTS,
            micro_batch_size=4,
        ),
        precision="fp32",
        data_parallel="fsdp2",
    )
    found: dict[str, Any] = {"told": {}, "classes of blocks": len({type(block) for block in model.blocks})}
    for name, operations in plans.items():
        engine.executor.activate(SkipPlan(operations, control.world_size), control.rank)
        with meter() as metered:
            engine.step([micro_batch(0, slot, SLOTS) for slot in range(SLOTS)])
        found[name] = metered.bytes_sent
        found["told"][name] = told.of(SkipPlan(operations, control.world_size), "replicated")
    sizes = [sum(p.numel() for p in block.parameters()) * 4 for block in tiny_vit().blocks]
    share = (control.world_size - 1) / control.world_size
    found["block's weights, forward and backward"] = 2 * sizes[0] * share
    return found


def check_bytes_to_come(control: Control) -> dict[str, Any]:
    """Of what two tensor-parallel ranks allocate at once in a step beside one small image's activations, in shares of
    what was told: where weights do not stay gathered, and where they do. One rank for each slice, so that no other
    thread gives memory back, of which torch's profiler knows nothing."""
    found = {}
    for name, optimizer in (("in turn", "sgd"), ("kept", "adamw")):
        engine = build(control, "fsdp2 tp", tiny_vit(num_heads=4, embed_dim=384), optimizer)
        engine.executor.activate(SkipPlan.dense(SLOTS, 1, DEPTH, 4), 0)
        told = engine.bytes_to_come
        with torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
        ) as profile:
            for _ in range(2):  # in the second step the optimizer has its state
                engine.step([random_batch(slot, samples=1) for slot in range(SLOTS)])
        events = [each for each in profile.profiler.kineto_results.events() if each.name() == "[memory]"]
        events.sort(key=lambda event: event.start_ns())
        found[name] = float(np.cumsum([event.nbytes() for event in events]).max() / told)
    return found


def check_reduced_bytes(control: Control) -> dict[str, Any]:
    """Bytes of DDP's all-reduces as counted in its first steps, in which it lays its buckets out; and a ring's."""
    model = tiny_vit()
    engine = build(control, "ddp", model, "sgd")
    counted = []
    for step in range(3):
        engine.executor.activate(plan_of("random", step, control.world_size), control.rank)
        with meter() as metered:
            engine.step([micro_batch(step, slot, SLOTS) for slot in range(SLOTS)])
        counted.append(metered.bytes_sent.get("allreduce"))
    gradients = sum(p.numel() * 4 for p in model.parameters() if p.requires_grad)
    return {"counted": counted, "ring": 2 * (control.world_size - 1) / control.world_size * gradients}


def check_full_model(control: Control) -> float:
    """What the gathered model computes, less what it computed before it was spread: with rotary positions, which no
    state has."""
    sizes = {"num_classes": CLASSES, "use_rot_pos_emb": True, "ref_feat_shape": (4, 4)}
    model = tiny(Eva, 0.1, head_init_scale=1.0, **sizes)
    images = random_batch(0)[0]
    expected = model.eval()(images)
    engine = build(control, "fsdp2", model, "sgd")
    with torch.no_grad(), engine.full_model() as full:
        return float((full(images) - expected).abs().max())


def check_resume(control: Control, saved_by: str, resumed_by: str, lora: bool = False) -> dict[str, Any]:
    """Difference from an uninterrupted run after a portable checkpoint goes to another engine."""
    folder = Path(control.broadcast(tempfile.mkdtemp().encode()).decode())
    engine = build(control, saved_by, model_for(saved_by, "adamw", lora), "adamw")
    trained(control, engine, saved_by, "same", range(1))
    engine.save(folder, write_file)
    control.barrier(30)
    uninterrupted = trained(control, engine, saved_by, "same", range(1, 3))
    options = {"num_heads": 4, "qk_norm": True} if "tp" in saved_by else {}
    other_model = tiny_vit(seed=1, qkv_bias=False, **options)
    if lora:
        other_model = with_lora(other_model)
    if resumed_by.startswith("zero"):
        other: Any = deepspeed_engine(other_model, "adamw", int(resumed_by[-1]))
    else:
        other = build(control, resumed_by, other_model, "adamw")
    other.restore(folder)
    for step in range(1, 3):
        # Of equal rows for all replicas, so that layouts with fewer replicas train the same.
        step_with_layout(control, other, resumed_by, saved_by, step)
    with other.full_model() as full:
        difference = largest_difference(dict(full.named_parameters()), uninterrupted)
    other.save(folder / "again", write_file)
    control.barrier(30)
    if not lora:
        tiny_vit(qkv_bias=False, **options).load_state_dict(load_file(folder / "again/model.safetensors"))
    return {"difference": difference, "same": saved_by == resumed_by}


def step_with_layout(control: Control, engine: Any, name: str, as_name: str, step: int) -> None:
    """One step by the plan of layout `as_name`, which must have as many replicas."""
    layout, planned = layout_of(control, name), layout_of(control, as_name)
    plan = plan_for(as_name, "same", step, planned.replicas)
    assert layout.replicas == planned.replicas
    engine.executor.activate(plan, layout.replica)
    rows = [slot * layout.replicas + layout.replica for slot in range(SLOTS)]
    engine.step([micro_batch(step, row, plan.num_rows) for row in rows])


def check_sharded_checkpoint(control: Control, saved_by: str, loaded_by: str) -> dict[str, Any]:
    """torch's DCP: difference from an uninterrupted run, after saving on one mesh and loading on another."""
    folder = Path(control.broadcast(tempfile.mkdtemp().encode()).decode())
    replicas, rank = control.world_size, control.rank

    def spread(seed: int, mesh: str) -> Any:
        model = tiny_vit(seed, qkv_bias=False)
        executor = attach(model)
        shape = (2, replicas // 2) if mesh == "hsdp" else (replicas,)
        shard(model, init_device_mesh("cpu", shape, mesh_dim_names=("replica", "shard")[: len(shape)]))
        d2ft_hpc.prepare(model, executor)
        return model, executor, torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-6)

    def steps(model: Any, executor: Any, optimizer: Any, numbers: range) -> dict[str, torch.Tensor]:
        for step in numbers:
            executor.activate(plan_of("random", step, replicas), rank)
            for slot in range(SLOTS):
                images, labels = micro_batch(step, slot * replicas + rank, SLOTS * replicas)
                with executor.micro_batch(slot):
                    loss_function(model(images), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
        return whole_weights(model, executor)

    first = spread(0, saved_by)
    steps(*first, range(1))
    save_sharded(folder, first[0], first[2], first[1])
    uninterrupted = steps(*first, range(1, 3))
    second = spread(1, loaded_by)
    load_sharded(folder, second[0], second[2], second[1])
    difference = largest_difference(steps(*second, range(1, 3)), uninterrupted)
    control.barrier(30)
    if rank == 0:
        (folder / ".metadata").write_bytes(pickle.dumps(Path.cwd))  # names a function that is not DCP's
    control.barrier(30)
    with pytest.raises(CheckpointError) as refused:
        load_sharded(folder, second[0], second[2], second[1])
    return {"difference": difference, "foreign metadata": str(refused.value)}


def check_refusals(control: Control) -> dict[str, str]:
    """What cannot run exactly is refused before the first step."""

    def message(kind: type[D2ftError], refuse: Callable[[], object]) -> str:
        with pytest.raises(kind) as refused:
            refuse()
        return str(refused.value)

    found = {}
    model = tiny_vit()
    late = DistributedDataParallel(model)
    executor = attach(model)
    found["attached late"] = message(ConfigError, lambda: d2ft_hpc.prepare(late, executor))
    static = DistributedDataParallel(model, static_graph=True)
    found["static graph"] = message(ConfigError, lambda: d2ft_hpc.prepare(static, executor))
    ddp = DistributedDataParallel(model)
    d2ft_hpc.prepare(ddp, executor)
    one = plan_of("full", 0, control.world_size + 1)
    found["replicas"] = message(PlanError, lambda: executor.activate(one, 0))
    model = tiny_vit()
    executor = attach(model)
    found["no model"] = message(ConfigError, lambda: d2ft_hpc.prepare(nn.Linear(2, 2), executor))
    fully_shard(model.blocks[1].mlp)
    fully_shard(model)
    found["inner unit"] = message(ConfigError, lambda: d2ft_hpc.prepare(model, executor))
    model = tiny_vit()
    executor = attach(model)
    fully_shard([model.blocks[3], model.head])
    fully_shard(model)
    found["unit of a block and others"] = message(ConfigError, lambda: d2ft_hpc.prepare(model, executor))
    for how in ("ddp", "fsdp2"):
        model = tiny_vit()
        executor = attach(model)
        trainer: nn.Module = model
        if how == "ddp":
            trainer = DistributedDataParallel(model)
        else:
            shard(model, init_device_mesh("cpu", (control.world_size,)))
        executor.activate(plan_of("random", 0, control.world_size), control.rank)
        with executor.micro_batch(0):
            images = micro_batch(0, 0, 2)[0]
            found[f"{how} not prepared"] = message(PlanError, partial(trainer, images))
    model = tiny_vit()
    executor = attach(model)
    mesh = init_device_mesh("cpu", (control.world_size,))
    found["3 heads on 2 ranks"] = message(PlanError, lambda: split_heads(model, executor, mesh))
    model = tiny_vit(num_heads=4)
    add_lora(model, rank=2, alpha=3, dropout=0.1, layers=("qkv",))
    executor = attach(model)
    found["dropout"] = message(UnsupportedModelError, lambda: split_heads(model, executor, mesh))
    return found


QUICK = (
    "fp32 ddp random adamw",
    "fp32 fsdp2 random adamw",
    "fp32 fsdp2 whole blocks sgd",
    "fp32 fsdp2 whole pairs adamw",
    "bf16 fsdp2 random adamw",
    "full model",
    "attach ddp last",
    "loop ddp last incomplete",
    "loop fsdp2 last whole blocks",
    "resume fsdp2 -> fsdp2",
    "gathered bytes",
    "gathered bytes in pairs",
    "reduced bytes",
    "bytes to come",
    "refusals",
    "sharded fsdp -> fsdp",
)
"""What `make test` runs, on 2 ranks: both engines once, and one check of each kind."""
FULL = {
    2: (
        *(
            f"{precision} {engine} random adamw"
            for precision in ("fp32", "bf16")
            for engine in ("ddp", "fsdp2")
        ),
        *(f"fp32 {engine} whole blocks sgd" for engine in ("ddp", "fsdp2")),
        *(f"fp32 {engine} resolutions adamw" for engine in ("ddp", "fsdp2")),
        *(f"fp32 {engine} lora random adamw" for engine in ("ddp", "fsdp2")),
        "fp32 ddp clipped adamw",
        "fp32 fsdp2 clipped adamw",
        "fp32 fsdp2 recompute adamw",
        "fp32 ddp complete paths",
        "full model",
        "attach ddp last",
        "attach fsdp2 every",
        "loop ddp last",
        "loop ddp last incomplete",
        "loop ddp whole blocks adamw",
        "loop fsdp2 last whole blocks",
        "loop fsdp2 last incomplete adamw",
        "loop fsdp2 built on meta",
        "resume fsdp2 -> fsdp2",
        "resume fsdp2 -> zero3",
        "resume ddp -> fsdp2 lora",
        "gathered bytes",
        "gathered bytes in pairs",
        "bf16 fsdp2 tp whole blocks adamw",
        "reduced bytes",
        "bytes to come",
        "refusals",
        "sharded fsdp -> fsdp",
    ),
    4: (
        "fp32 fsdp2 tp random adamw",
        "fp32 fsdp2 tp lora random adamw",
        "fp32 fsdp2 tp resolutions adamw",
        "bf16 fsdp2 tp random adamw",
        "fp32 fsdp2 tp clipped adamw",
        "loop hsdp last whole pairs",
        "loop hsdp recompute last",
        "resume fsdp2 tp -> fsdp2 tp",
        "sharded fsdp -> hsdp",
    ),
}
"""What `make test-full` runs, by number of ranks."""


def checks(world_size: int, choice: Choice) -> dict[str, Callable[[Control], Any]]:
    """By name."""
    matrix = whole_matrix(world_size)
    if choice == "matrix":
        return matrix
    return {name: matrix[name] for name in (QUICK if choice == "quick" else FULL[world_size])}


def whole_matrix(world_size: int) -> dict[str, Callable[[Control], Any]]:
    named: dict[str, Callable[[Control], Any]] = {}
    for engine in ("ddp", "fsdp2", "fsdp2 tp"):
        for lora in (False, True):
            shown = f"{engine}{' lora' if lora else ''}"
            for kind in ("full", "same", "random", "whole blocks", "resolutions"):
                for optimizer in ("sgd", "adamw"):
                    options: Any = {"engine": engine, "kind": kind, "optimizer": optimizer, "lora": lora}
                    named[f"fp32 {shown} {kind} {optimizer}"] = partial(check_fp32, **options)
                    named[f"bf16 {shown} {kind} {optimizer}"] = partial(check_bf16, **options)
        base: Any = {"engine": engine, "kind": "random", "optimizer": "adamw"}
        named[f"fp32 {engine} clipped adamw"] = partial(check_fp32, clipping=0.05, **base)
        named[f"fp32 {engine} recompute adamw"] = partial(check_fp32, recompute=True, **base)
        if engine == "fsdp2":
            named["fp32 fsdp2 whole pairs adamw"] = partial(check_fp32, **base | {"kind": "whole pairs"})
        if "tp" not in engine:
            base["kind"] = "one complete"
            named[f"fp32 {engine} complete paths"] = partial(check_fp32, embeddings="complete_path", **base)
    named["sharded fsdp -> fsdp"] = partial(check_sharded_checkpoint, saved_by="fsdp", loaded_by="fsdp")
    if world_size == 2:
        loops: dict[str, dict[str, Any]] = {
            "ddp last": {"how": "ddp", "reduced_in": "last"},
            "ddp compiled model": {"how": "ddp", "compiled": "model"},
            "fsdp2 built on meta": {"how": "fsdp2", "built_on": "meta"},
            "ddp last incomplete": {"how": "ddp", "reduced_in": "last", "last_slots": 1},
            "ddp whole blocks adamw": {"how": "ddp", "kind": "whole blocks", "optimizer": "adamw"},
            "fsdp2 last whole blocks": {"how": "fsdp2", "reduced_in": "last", "kind": "whole blocks"},
            "fsdp2 last incomplete adamw": {
                "how": "fsdp2",
                "kind": "whole blocks",
                "optimizer": "adamw",
                "reduced_in": "last",
                "last_slots": 1,
            },
            "fsdp2 compiled blocks": {"how": "fsdp2", "compiled": "blocks", "kind": "one complete"},
        }
        resumed = {
            "fsdp2 -> fsdp2": {"saved_by": "fsdp2", "resumed_by": "fsdp2"},
            "fsdp2 -> zero3": {"saved_by": "fsdp2", "resumed_by": "zero3"},
            "ddp -> fsdp2 lora": {"saved_by": "ddp", "resumed_by": "fsdp2", "lora": True},
        }
        named["gathered bytes"] = partial(check_gathered_bytes, optimizer="sgd")
        named["gathered bytes in pairs"] = partial(check_gathered_bytes, optimizer="adamw")
        named["reduced bytes"] = check_reduced_bytes
        named["bytes to come"] = check_bytes_to_come
        named["full model"] = check_full_model
        named["refusals"] = check_refusals
    else:
        loops = {
            "hsdp whole blocks": {"how": "fsdp2", "hsdp": True, "kind": "whole blocks"},
            "hsdp last whole pairs": {
                "how": "fsdp2",
                "hsdp": True,
                "reduced_in": "last, between nodes",
                "kind": "whole pairs",
            },
            "hsdp recompute last": {"how": "fsdp2", "hsdp": True, "recompute": True, "reduced_in": "last"},
        }
        resumed = {"fsdp2 tp -> fsdp2 tp": {"saved_by": "fsdp2 tp", "resumed_by": "fsdp2 tp"}}
        named["sharded fsdp -> hsdp"] = partial(check_sharded_checkpoint, saved_by="fsdp", loaded_by="hsdp")
    for how, sharing in (("ddp", "every"), ("ddp", "last"), ("fsdp2", "every")):
        named[f"attach {how} {sharing}"] = partial(check_attached_loop, how=how, sharing=sharing)
    named |= {f"loop {name}": partial(check_user_loop, **options) for name, options in loops.items()}
    named |= {f"resume {name}": partial(check_resume, **options) for name, options in resumed.items()}
    return named


if __name__ == "__main__":
    sys.exit(run_checks(checks))
