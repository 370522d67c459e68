"""Run under a launcher: each check trains through DeepSpeed and compares with one process; rank 0 prints JSON.

    mpirun -n 2 python -m tests.distributed.engine_checks CHOICE [--only WORDS]

A check's result is the largest difference of any parameter, or a dict of facts; the tests judge them. A check that
takes too long ends its rank with the stacks of all threads, and the launcher then ends the others.
"""

from __future__ import annotations

import argparse
import faulthandler
import gc
import json
import logging
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import numpy as np
import pytest
import timm.utils
import torch
import torch.nn.functional as F
from packaging.version import Version
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer
from torch import distributed, nn
from torch.distributed import distributed_c10d
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

import d2ft_hpc
from analysis.engines.bare import bare_engine, frozen_below
from d2ft_hpc.config import OptimizerConfig
from d2ft_hpc.engines import deepspeed_private as private
from d2ft_hpc.engines.deepspeed import DeepSpeedEngine, deepspeed_config
from d2ft_hpc.engines.optimizer import build_optimizer, build_schedule
from d2ft_hpc.engines.plain import PlainEngine
from d2ft_hpc.engines.portable import write_file
from d2ft_hpc.engines.zero import adds_up_wrong
from d2ft_hpc.errors import D2ftError, PlanError
from d2ft_hpc.execution.attach import attach
from d2ft_hpc.launch import Control, connect, detect
from d2ft_hpc.metering import meter
from d2ft_hpc.parallel.rank_layout import Placement, RankLayout
from d2ft_hpc.planning import SkipPlan
from d2ft_hpc.planning.communication_volume import Replicas
from d2ft_hpc.scores import gradient_scores
from tests.distributed.launching import Choice
from tests.models import DEPTH, HEADS, random_batch, tiny_vit
from tests.private_names import PRIVATE_NAMES
from tests.unit import test_eva

SECONDS_A_CHECK = 300
SLOTS, STEPS = 2, 3


def plan_of(kind: str, step: int, replicas: int) -> SkipPlan:
    """Rows [slot * replicas + replica]; for every kind but "same" they differ between replicas."""
    rng = np.random.default_rng((7, step))
    operations = rng.integers(0, 3, (SLOTS * replicas, DEPTH, HEADS)).astype(np.uint8)
    if kind == "full":
        operations[:] = 2
    elif kind == "same":
        operations = np.repeat(operations[:SLOTS], replicas, axis=0)
    elif kind == "one complete":
        operations[0] = 2
    elif kind == "whole blocks":
        operations[rng.random((SLOTS * replicas, DEPTH)) < 0.5] = 0
        operations[:, 1] = 0  # a block that nobody runs
    elif kind == "whole pairs":
        half = operations[replicas:] if step % 2 else operations[:replicas]
        half[:, 2:] = 0  # neighbours that nobody runs in one micro-batch, the last or the first
    return SkipPlan(operations, replicas, grids=grids_of(kind, rng, len(operations)))


def grids_of(kind: str, rng: np.random.Generator, rows: int) -> np.ndarray | None:
    """For kind "resolutions": patches of each row's images, of which full size has 4 x 4."""
    return rng.integers(2, 5, (rows, 2)) if kind == "resolutions" else None


def micro_batch(step: int, row: int, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The last step is a partial batch: its rows differ in size."""
    samples = 4 if step < STEPS - 1 else 2 + row % 2
    return random_batch(step * rows + row, samples)


def loss_function(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.float(), labels)


EPSILON = {"fp32": 1e-6, "bf16": 1e-4, "fp16": 1e-4}
"""Of AdamW, by precision. It divides by the gradient's size, so a gradient's rounding counts up to lr / epsilon times.
With 1e-6 under bf16 whole steps of small gradients are rounding, of which a plan has more than the dense model does,
because it sums fewer terms: plain autograd in one process is then up to 2.2 times as far from fp64 as dense under the
same plan, with any engine (analysis/engines). With 1e-4 what is compared is the gradients."""


def optimizer_maker(name: str, epsilon: float) -> Callable[[nn.Module], tuple[Optimizer, LRScheduler]]:
    """What makes the optimiser and its schedule for a model or a part of it."""
    config = OptimizerConfig(
        name=name, learning_rate=0.05 if name == "sgd" else 1e-3, epsilon=epsilon, warmup_share=2 / STEPS
    )

    def make(part: nn.Module) -> tuple[Optimizer, LRScheduler]:
        optimizer = build_optimizer(part, config)
        return optimizer, build_schedule(optimizer, config, STEPS)

    return make


def reference_parameters(
    model: nn.Module,
    kind: str,
    optimizer_name: str,
    clipping: float | None,
    replicas: int,
    embeddings: str = "frozen",
    precision: str = "fp32",
) -> Any:
    """What one process gets from the same rows, in the model's own precision; `precision` is that of the ranks."""
    plans = [plan_of(kind, step, replicas) for step in range(STEPS)]
    make = optimizer_maker(optimizer_name, EPSILON[precision])
    return trained_alone(model, plans, make, clipping, embeddings)


def trained_alone(
    model: nn.Module,
    plans: Sequence[SkipPlan],
    make_optimizer: Callable[[nn.Module], tuple[Optimizer, LRScheduler]],
    clipping: float | None,
    embeddings: str,
) -> Any:
    """Parameters by name after a step in one process under each plan, all replicas' rows in turn."""
    executor = attach(model, embeddings=embeddings)
    engine = PlainEngine(model, executor, *make_optimizer(model), loss_function, gradient_clipping=clipping)
    dtype = next(model.parameters()).dtype
    for step, plan in enumerate(plans):
        executor.activate(replace(plan, replicas=1), 0)
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
    embeddings: str = "frozen",
    compiled: bool = False,
    **more: Any,
) -> DeepSpeedEngine:
    executor = attach(model, embeddings=embeddings, compile=compiled)
    optimizer, schedule = optimizer_maker(optimizer_name, EPSILON[precision])(model)
    config = deepspeed_config(
        {"zero_optimization": {"stage": stage, **(zero or {})}},
        micro_batch_size=4,
        slots=SLOTS,
        precision=precision,
        gradient_clipping=clipping,
    )
    return DeepSpeedEngine(
        model,
        executor,
        optimizer,
        schedule,
        loss_function,
        {**config, **more},
        flattens=True,
    )


def trained_parameters(
    control: Control, engine: DeepSpeedEngine, kind: str, steps: Iterable[int] = range(STEPS)
) -> dict[str, torch.Tensor]:
    for step in steps:
        plan = plan_of(kind, step, control.world_size)
        engine.check(plan)
        engine.executor.activate(plan, control.rank)
        rows = [slot * control.world_size + control.rank for slot in range(SLOTS)]
        engine.step([micro_batch(step, row, plan.num_rows) for row in rows])
    with engine.full_model() as full:
        return {name: parameter.detach().clone() for name, parameter in full.named_parameters()}


def largest_difference(one: Any, other: Any) -> float:
    return max(
        float((one[name].detach().double() - other[name].detach().double()).abs().max()) for name in other
    )


def model_for(optimizer_name: str) -> VisionTransformer:
    """A key bias has a gradient of zero, except for rounding, which AdamW would turn into steps of full size."""
    return tiny_vit(qkv_bias=optimizer_name == "sgd")


def check_fp32(
    control: Control,
    kind: str,
    stage: int,
    optimizer_name: str,
    clipping: float | None = None,
    zero: dict[str, Any] | None = None,
    recompute: bool = False,
    embeddings: str = "frozen",
    compiled: bool = False,
) -> float:
    model = model_for(optimizer_name)
    model.set_grad_checkpointing(recompute)
    engine = deepspeed_engine(
        model,
        optimizer_name,
        stage,
        clipping=clipping,
        zero=zero,
        embeddings=embeddings,
        compiled=compiled,
    )
    own = trained_parameters(control, engine, kind)
    reference = model_for(optimizer_name)
    return largest_difference(
        own, reference_parameters(reference, kind, optimizer_name, clipping, control.world_size, embeddings)
    )


def check_compiled_blocks(control: Control) -> float:
    """Under ZeRO 3, of which other checks have put DeepSpeed's linear function in place of torch's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "linear", torch._C._nn.linear)
        difference = check_fp32(control, "one complete", 3, "adamw", zero=SMALL_BUCKETS, compiled=True)
        assert F.linear is torch._C._nn.linear
    return difference


def check_bf16(control: Control, kind: str, stage: int, optimizer_name: str) -> dict[str, float]:
    """Root-mean-square distance from fp64, of the plan under DeepSpeed and of the dense model under DeepSpeed."""

    def error(of_kind: str) -> float:
        engine = deepspeed_engine(model_for(optimizer_name), optimizer_name, stage, precision="bf16")
        own = trained_parameters(control, engine, of_kind)
        model = model_for(optimizer_name).double()
        exact = reference_parameters(
            model, of_kind, optimizer_name, None, control.world_size, precision="bf16"
        )
        squares = [(own[name].double() - exact[name]).square().flatten() for name in exact]
        return float(torch.cat(squares).mean().sqrt())

    return {"plan": error(kind), "dense": error("full")}


def check_bf16_of_buffers(control: Control) -> dict[str, float]:
    """As `check_bf16`, of an Eva whose keys' bias is a buffer, and from fp32."""

    def trained(of_kind: str, precision: str) -> dict[str, torch.Tensor]:
        model = test_eva.tiny_eva(**test_eva.VARIANTS["like EVA-02 small"], depth=DEPTH)
        return trained_parameters(control, deepspeed_engine(model, "sgd", 1, precision=precision), of_kind)

    def error(of_kind: str) -> float:
        own, exact = trained(of_kind, "bf16"), trained(of_kind, "fp32")
        squares = [(own[name].double() - exact[name].double()).square().flatten() for name in exact]
        return float(torch.cat(squares).mean().sqrt())

    return {"plan": error("random"), "dense": error("full")}


def check_resume(control: Control, saved_by: int, resumed_by: int, precision: str) -> dict[str, Any]:
    """Difference from an uninterrupted run after a checkpoint goes from one ZeRO stage to another."""
    folder = Path(control.broadcast(tempfile.mkdtemp().encode()).decode())
    engine = deepspeed_engine(model_for("adamw"), "adamw", saved_by, precision=precision)
    trained_parameters(control, engine, "random", [0])
    engine.save(folder, write_file)
    control.barrier(30)
    uninterrupted = trained_parameters(control, engine, "random", [1, 2])
    other = deepspeed_engine(tiny_vit(seed=1, qkv_bias=False), "adamw", resumed_by, precision=precision)
    other.restore(folder)
    difference = largest_difference(trained_parameters(control, other, "random", [1, 2]), uninterrupted)
    plain = model_for("adamw")
    plain.load_state_dict(load_file(folder / "model.safetensors"), strict=True)
    return {"difference": difference}


def check_user_loop(control: Control, stage: int, compiled: bool = False) -> dict[str, float | str]:
    """A loop of the user's own around `d2ft_hpc.initialize`: one dense batch, then the plan that it gave."""
    replicas, rank = control.world_size, control.rank
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": SLOTS,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "d2ft": {"planner": "joint", "compute_budget": 0.6},
    }
    model, reference = model_for("sgd"), model_for("sgd")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    engine, *_ = d2ft_hpc.initialize(model=model, optimizer=optimizer, config=config)
    if compiled:
        engine.compile(backend="aot_eager")  # what its kernels compute is not ours
    for step in range(STEPS):
        for slot in range(SLOTS):
            images, labels = micro_batch(step, slot * replicas + rank, SLOTS * replicas)
            engine.backward(loss_function(engine(images), labels))
            engine.step()
    follower = engine.d2ft
    executor = attach(reference)
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.05)
    batches = [[micro_batch(s, r, SLOTS * replicas) for r in range(SLOTS * replicas)] for s in range(STEPS)]
    fisher = [
        gradient_scores(reference, executor.subnets, *pair, loss_function, ["fisher"])["fisher"]
        for pair in batches[0]
    ]
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    plain = PlainEngine(reference, executor, optimizer, schedule, loss_function)
    for step, batch in enumerate(batches):
        if step == 1:
            executor.activate(SkipPlan(follower.plan.operations, replicas=1), 0)
        plain.step(batch)
    own = {}
    with follower._ours.full_model() as full:
        own = {name: parameter.detach().clone() for name, parameter in full.named_parameters()}
    scores = torch.from_numpy(follower.scores.forward.copy())
    return {
        "parameters": largest_difference(own, dict(reference.named_parameters())),
        "scores": float((scores / torch.cat(fisher) - 1).abs().max()),
        "planned compute": float(follower.plans.context.costs.planned_share(follower.plan)),
        "told compute": follower.report(),
    }


USER_CONFIG = {
    "train_micro_batch_size_per_gpu": 4,
    "gradient_accumulation_steps": SLOTS,
    "gradient_clipping": 0.0,
    "zero_allow_untested_optimizer": True,
    "steps_per_print": 10**9,
}


def check_user_checkpoint(control: Control, stage: int, after: int) -> dict[str, Any]:
    """DeepSpeed's own checkpoint of a user's loop, saved `after` so many batches, goes on in a new engine as the old
    one does: with the plan, and in the middle of the batches that give the next one."""
    replicas, rank, batches = control.world_size, control.rank, 8
    folder = control.broadcast(tempfile.mkdtemp().encode()).decode()
    planning = {
        "planner": "joint",
        "compute_budget": 0.6,
        "replan": {"every": "3 steps"},
    }
    config = {**USER_CONFIG, "zero_optimization": {"stage": stage}, "d2ft": planning}

    def make(seed: int, slots: int = SLOTS) -> Any:
        model = tiny_vit(seed, qkv_bias=False)
        groups = [{"params": list(part.parameters()), "lr": 1e-3} for part in model.children()]
        outside = [model.pos_embed, model.cls_token]  # frozen, as is the patch embedding
        optimizer = torch.optim.AdamW([{"params": outside, "lr": 1e-4}, *(g for g in groups if g["params"])])
        settings = {**config, "gradient_accumulation_steps": slots}
        return d2ft_hpc.initialize(model=model, optimizer=optimizer, config=settings)[0]

    def train(engine: Any, steps: range) -> list[str]:
        plans = []
        for step in steps:
            for slot in range(SLOTS):
                images, labels = random_batch(step * SLOTS * replicas + slot * replicas + rank, 4)
                engine.backward(loss_function(engine(images), labels))
                engine.step()
            plans.append("dense" if engine.d2ft.plan is None else engine.d2ft.plan.hash)
        return plans

    engine, other = make(0), make(1)
    assert not hasattr(timm.utils.ModelEmaV3(engine.module).module.blocks[0], "_d2ft") or stage == 3
    before = train(engine, range(after))
    engine.save_checkpoint(folder, client_state={"own": 7})
    told = [engine.d2ft.report()]
    of_larger_batches = make(2, 2 * SLOTS)  # as on half of the ranks: plans do not fit and begin anew
    of_larger_batches.load_checkpoint(folder)
    told.append(of_larger_batches.d2ft.report())
    plans = train(engine, range(after, batches))
    _, state = other.load_checkpoint(folder)
    resumed = train(other, range(after, batches))
    with engine.d2ft._ours.full_model() as one, other.d2ft._ours.full_model() as two:
        difference = largest_difference(dict(two.named_parameters()), dict(one.named_parameters()))
    return {
        "difference": difference,
        "plans": [*before, *plans],
        "resumed": [*before, *resumed],
        "own": state["own"],
        "so far": [each.splitlines()[1] for each in told],
    }


def check_user_boundary(control: Control, stage: int, once: bool = False) -> float:
    """A user's loop with incomplete groups of micro-batches, after which it lets DeepSpeed step. once: it calls `step`
    there alone, as DeepSpeed's documentation has it."""
    replicas, rank = control.world_size, control.rank
    config = {
        **USER_CONFIG,
        "zero_optimization": {"stage": stage},
        "d2ft": {"planner": "random"},
    }
    model, reference = model_for("sgd"), model_for("sgd")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    engine, *_ = d2ft_hpc.initialize(model=model, optimizer=optimizer, config=config)
    plan = plan_of("random", 0, replicas)  # whose rows differ
    engine.d2ft.activate(plan)
    executor = attach(reference)
    executor.activate(replace(plan, replicas=1), 0)
    plain = torch.optim.SGD(reference.parameters(), lr=0.05)
    for step, slots in enumerate((SLOTS, 1, SLOTS)):
        for slot in range(slots):
            engine.set_gradient_accumulation_boundary(slot == slots - 1)
            for row in range(slot * replicas, (slot + 1) * replicas):
                images, labels = micro_batch(0, step * SLOTS * replicas + row, SLOTS * replicas)
                with executor.micro_batch(row):
                    (loss_function(reference(images), labels) / (SLOTS * replicas)).backward()
                if row % replicas == rank:
                    engine.backward(loss_function(engine(images), labels))
                    if slot == slots - 1 or not once:
                        engine.step()
        plain.step()
        plain.zero_grad()
    with engine.d2ft._ours.full_model() as full:
        return largest_difference(dict(full.named_parameters()), dict(reference.named_parameters()))


def check_flat(control: Control, stage: int) -> dict[str, Any]:
    """A script whose blocks' parameters are flat ones while they run: what it sees of the model is as without, and its
    checkpoints go on without us, and those from there here."""
    replicas, rank = control.world_size, control.rank
    utils = private.import_deepspeed().utils

    def config(**ours: Any) -> dict[str, Any]:
        """Made anew for each engine: the oldest DeepSpeed takes keys out."""
        optimizer = {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}}
        return {**USER_CONFIG, "optimizer": optimizer, "zero_optimization": {"stage": stage}, **ours}

    planning = {"planner": "random", "options": {"full_share": 0.3}}
    folder = control.broadcast(tempfile.mkdtemp().encode()).decode()

    def without(seed: int) -> Any:
        model = frozen_below(tiny_vit(seed, qkv_bias=False))
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return private.import_deepspeed().initialize(model=model, model_parameters=trained, config=config())[
            0
        ]

    def train(engine: Any, step: int) -> dict[str, torch.Tensor]:
        """Returns the step's gradients, as DeepSpeed gives them to scripts."""
        for slot in range(SLOTS):
            images, labels = random_batch(step * SLOTS * replicas + slot * replicas + rank, 4)
            engine.backward(loss_function(engine(images), labels))
            gradients = of_all(engine, utils.safe_get_full_grad) if slot == SLOTS - 1 else {}
            engine.step()
        return gradients

    def of_all(engine: Any, read: Callable[..., torch.Tensor], *key: str) -> dict[str, torch.Tensor]:
        return {
            name: read(parameter, *key).clone()
            for name, parameter in engine.module.named_parameters()
            if parameter.requires_grad
        }

    def read_and_double(engine: Any) -> dict[str, torch.Tensor]:
        """What DeepSpeed's optimiser keeps of each parameter."""
        weights = of_all(engine, utils.safe_get_full_fp32_param)
        moments = of_all(engine, utils.safe_get_full_optimizer_state, "exp_avg")
        for name in weights:
            parameter = engine.module.get_parameter(name)
            utils.safe_set_full_fp32_param(parameter, 2 * weights[name])
            utils.safe_set_full_optimizer_state(parameter, 2 * moments[name], "exp_avg")
        return {**weights, **{f"moment of {name}": moment for name, moment in moments.items()}}

    def masters(engine: Any, tag: str) -> dict[str, torch.Tensor]:
        """As DeepSpeed's own tool reads them from a checkpoint."""
        engine.save_checkpoint(folder, tag)
        distributed.barrier()
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

        found = get_fp32_state_dict_from_zero_checkpoint(folder, tag)
        return {name: torch.as_tensor(value) for name, value in found.items()}

    model = tiny_vit(qkv_bias=False)
    own = dict(model.named_parameters())
    engine, *_ = d2ft_hpc.initialize(model=model, config=config(d2ft=planning))
    train(engine, 0)
    facts: dict[str, Any] = {
        "flat": sum(map(len, engine.optimizer.bit16_groups)),
        "same": [(name, id(each)) for name, each in model.named_parameters()]
        == [(name, id(each)) for name, each in own.items()],
        "copied": all(map(torch.equal, timm.utils.ModelEmaV3(model).module.parameters(), model.parameters())),
    }
    trained = masters(engine, "ours")
    facts["moved"] = largest_difference(own, trained)
    other = without(1)
    other.load_checkpoint(folder, "ours")
    engine.d2ft.activate(SkipPlan.dense(SLOTS, replicas, DEPTH, HEADS))
    train(engine, 1)
    train(other, 1)
    ours, theirs = masters(engine, "ours later"), masters(other, "theirs")
    last, *_ = d2ft_hpc.initialize(model=tiny_vit(2, qkv_bias=False), config=config(d2ft=planning))
    last.load_checkpoint(folder, "theirs")
    last.d2ft.activate(SkipPlan.dense(SLOTS, replicas, DEPTH, HEADS))
    facts["gradients"] = largest_difference(train(last, 2), train(other, 2))
    facts["kept"] = largest_difference(read_and_double(last), read_and_double(other))
    if hasattr(last.optimizer, "offload_states"):  # older ones move none below ZeRO 3
        last.offload_states(pin_memory=False)
        last.reload_states()
    # As scripts do that put averages in for an evaluation, and out.
    for parameter in last.module.parameters():
        parameter.data = parameter.data.clone()
    train(last, 3)
    train(other, 3)
    facts["seen"] = largest_difference(dict(last.module.named_parameters()), masters(last, "seen"))
    return {
        **facts,
        "names": list(ours) == list(theirs),
        "there": largest_difference(ours, theirs),
        "and back": largest_difference(masters(last, "back"), masters(other, "later")),
    }


def check_choose(control: Control, stage: int) -> dict[str, float]:
    """A loop of the user's own that trains on what planner `samples` draws."""
    config = {
        "train_micro_batch_size_per_gpu": 8,
        "gradient_accumulation_steps": SLOTS,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,  # without it, 0.16.4 fails after the first step
        "d2ft": {"planner": "samples", "compute_budget": 0.6},
    }
    model = model_for("sgd")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    engine, *_ = d2ft_hpc.initialize(model=model, optimizer=optimizer, config=config)
    drawn, known = 0, 0
    batch = [random_batch(10 * slot + control.rank, 8) for slot in range(SLOTS)]
    images_of_batch, labels_of_batch = (torch.cat(parts) for parts in zip(*batch, strict=True))

    def loss_of_batch() -> float:
        engine.eval()
        with torch.no_grad():
            loss = loss_function(engine(images_of_batch), labels_of_batch)
        engine.train()
        return float(loss)

    before = loss_of_batch()
    for _ in range(8):
        for images, labels in engine.d2ft.choose(batch):
            drawn += len(images)
            known += sum(bool((images_of_batch == image).all(dim=(1, 2, 3)).any()) for image in images)
            loss = loss_function(engine(images), labels)
            engine.backward(loss)
            engine.step()
    share = drawn / (8 * SLOTS * 8)
    return {"share": share, "known": known / drawn, "learned": before - loss_of_batch()}


def check_scoring(control: Control, stage: int) -> dict[str, float]:
    """Logits at half the resolution between training steps, from timm's model with the same weights; and training."""
    model = model_for("sgd")
    engine = deepspeed_engine(model, "sgd", stage, zero=SMALL_BUCKETS)
    differences = []
    for step in range(STEPS):
        small = [
            F.interpolate(micro_batch(step, slot * control.world_size + control.rank, 8)[0], 8)
            for slot in range(SLOTS)
        ]
        logits = torch.cat(engine.logits(small))
        parameters = trained_parameters(control, engine, "random", [])
        timm_model = tiny_vit(dynamic_img_size=True).eval()
        timm_model.load_state_dict(parameters)
        with torch.no_grad():
            differences.append(float((logits - timm_model(torch.cat(small))).abs().max()))
        parameters = trained_parameters(control, engine, "random", [step])
    reference = reference_parameters(model_for("sgd"), "random", "sgd", None, control.world_size)
    return {"logits": max(differences), "parameters": largest_difference(parameters, reference)}


def check_one_plan_for_all(control: Control) -> dict[str, str]:
    """ZeRO-3 with activation checkpointing says why rows must be the same, and refuses others."""
    model = model_for("adamw")
    model.set_grad_checkpointing(True)
    engine = deepspeed_engine(model, "adamw", 3)
    with pytest.raises(PlanError) as refused:
        engine.check(plan_of("random", 0, control.world_size))
    return {"why": engine.same_rows or "", "refused": str(refused.value)}


def check_user_mistakes(control: Control) -> dict[str, str]:
    """What scripts are told that do what trains under no plan, or counts batches otherwise."""

    def told(planner: str, train: Callable[[Any], None]) -> str:
        model = tiny_vit().eval()  # as from_pretrained gives it
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        config = {**USER_CONFIG, "zero_optimization": {"stage": 1}, "d2ft": {"planner": planner}}
        engine, *_ = d2ft_hpc.initialize(model=model, optimizer=optimizer, config=config)
        with pytest.raises(D2ftError) as refused:
            train(engine)
        return str(refused.value)

    def batch(engine: Any, forward: Callable[..., torch.Tensor]) -> None:
        for slot in range(SLOTS):
            images, labels = micro_batch(0, slot * control.world_size + control.rank, 1)
            engine.backward(loss_function(forward(images), labels))
            engine.step()

    def by_its_module(engine: Any) -> None:
        engine.train()
        batch(engine, engine.module)

    def after_an_evaluation(engine: Any) -> None:
        engine.train()
        batch(engine, engine)
        engine.eval()
        batch(engine, engine)

    def in_larger_batches(engine: Any) -> None:
        engine.train()
        batch(engine, engine)
        engine.set_train_batch_size(2 * engine.train_batch_size())
        batch(engine, engine)

    return {
        "without train()": told("joint", lambda engine: batch(engine, engine)),
        "chosen without train()": told("samples", lambda engine: engine.d2ft.choose([random_batch(0)])),
        "after an evaluation": told("joint", after_an_evaluation),
        "by its module": told("joint", by_its_module),
        "in larger batches": told("joint", in_larger_batches),
    }


def check_private_names(control: Control, stage: int, precision: str) -> dict[str, list[str]]:
    """What this DeepSpeed's engine lacks of the undocumented attributes that the package uses."""
    engine = deepspeed_engine(model_for("adamw"), "adamw", stage, precision=precision).engine
    of_engine = (each for each in PRIVATE_NAMES if "runtime.engine:DeepSpeedEngine." in each.path)
    names = [
        each.path.rpartition(".")[2]
        for each in of_engine
        if Version(version("deepspeed")) >= Version(each.since)
    ]
    missing = [name for name in names if not hasattr(engine, name)]
    if stage in private.MASTER_WEIGHTS and private.flat_master_weights(engine) is None:
        missing.append(f"optimizer.{private.MASTER_WEIGHTS[stage]}")
    return {"missing": missing}


def check_bytes(control: Control) -> dict[str, Any]:
    """Bytes of a step's all-reduce as counted, beside the gradients' size."""
    model = tiny_vit()
    engine = deepspeed_engine(model, "sgd", 0)
    engine.executor.activate(plan_of("random", 0, control.world_size), control.rank)
    with meter() as metered:
        engine.step([micro_batch(0, slot, SLOTS) for slot in range(SLOTS)])
    gradients = sum(p.numel() * 4 for p in model.parameters() if p.requires_grad)
    return {
        "counted": metered.bytes_sent,
        "ring": 2 * (control.world_size - 1) / control.world_size * gradients,
    }


def check_message_model(control: Control, stage: int) -> dict[str, Any]:
    """Bytes of the second step as counted, beside those that the message model tells; the first is ZeRO 3's own."""
    model = tiny_vit()
    engine = deepspeed_engine(model, "sgd", stage, zero={"stage3_param_persistence_threshold": 1000})
    engine.executor.activate(plan_of("random", 0, control.world_size), control.rank)
    batch = [micro_batch(0, slot, SLOTS) for slot in range(SLOTS)]
    engine.step(batch)
    with meter() as metered:
        engine.step(batch)

    def size(chosen: Callable[[Any], bool]) -> float:
        return sum(4.0 * getattr(p, "ds_numel", p.numel()) for p in model.parameters() if chosen(p))

    every, trained = size(lambda p: True), size(lambda p: p.requires_grad)
    kept = size(lambda p: getattr(p, "ds_persist", False))
    assert stage < 3 or 0 < kept < every
    told = Replicas(f"zero{stage}", control.world_size, SLOTS, trained, every, trained, kept)
    return {"counted": metered.bytes_sent, "told": told.bytes_of_step()}


def check_overhead(control: Control, stage: int) -> dict[str, Any]:
    """What runs in a step of an all-FULL plan, and in one of the same DeepSpeed engine without us."""
    batch = [micro_batch(0, slot, SLOTS) for slot in range(SLOTS)]
    ours = deepspeed_engine(tiny_vit(), "sgd", stage)
    ours.executor.activate(plan_of("full", 0, control.world_size), control.rank)
    config = deepspeed_config(
        {"zero_optimization": {"stage": stage}},
        micro_batch_size=4,
        slots=SLOTS,
        precision="fp32",
        gradient_clipping=None,
    )

    placement = Placement(
        RankLayout.of(control.world_size, control.rank), [range(DEPTH)], np.zeros((DEPTH, HEADS), int)
    )
    make_optimizer = optimizer_maker("sgd", EPSILON["fp32"])
    bare = bare_engine(frozen_below(tiny_vit()), placement, config, make_optimizer, loss_function)
    found: dict[str, Any] = {}
    for name, step in (("ours", ours.step), ("bare", bare)):
        step(batch)  # the first makes what later ones keep
        with meter() as metered:
            step(batch)
        found[name] = {"operators": metered.operators, "bytes_sent": metered.bytes_sent}
    return found


def check_gathers(control: Control) -> dict[str, int]:
    """How many gathers begin after a step, whose weights the next micro-batch finds there, and how many are awaited."""
    from deepspeed import comm

    engine = deepspeed_engine(tiny_vit(), "sgd", 3)
    engine.executor.activate(plan_of("random", 0, control.world_size), control.rank)
    begun: list[Any] = []
    awaited: list[Any] = []
    begin = comm.all_gather_into_tensor

    def watched(*args: Any, **kwargs: Any) -> Any:
        work = begin(*args, **kwargs)
        begun.append(work)

        def wait() -> None:
            awaited.append(work)
            work.wait()

        return SimpleNamespace(wait=wait)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comm, "all_gather_into_tensor", watched)
        engine.step([micro_batch(0, slot, SLOTS) for slot in range(SLOTS)])
    return {"begun": len(begun), "awaited": len(awaited)}


SMALL_BUCKETS = {
    "reduce_bucket_size": 1000,
    "overlap_comm": True,
    "stage3_param_persistence_threshold": 0,
    "stage3_prefetch_bucket_size": 5000,
}
UNEVEN = {"reduce_bucket_size": 1000, "overlap_comm": False, "contiguous_gradients": False}
OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
VARIANTS: dict[str, dict[str, Any]] = {
    "small overlapped buckets": {"zero": SMALL_BUCKETS},
    **({} if adds_up_wrong() else {"scattered gradients": {"zero": UNEVEN}}),
    "offload": {"zero": OFFLOAD},
    "recompute": {"zero": SMALL_BUCKETS, "recompute": True},
    "embeddings trained by complete paths": {"zero": SMALL_BUCKETS, "embeddings": "complete_path"},
}


QUICK = (
    *(f"fp32 random zero{stage} clipped" for stage in range(4)),
    "fp32 whole blocks zero3 sgd",
    "bf16 random zero1 adamw",
    "bf16 random zero1 buffers",
    "names zero3 fp32",
    "resume fp32 zero3 -> zero2",
    "overhead zero1",
    "messages zero1",
    "scoring zero1",
    "choose zero3",
    "user loop zero2",
    "checkpoint zero2 plan",
    "boundary zero1",
    "boundary zero1 once",
    "flat zero1",
    "gathers",
    "one plan for all",
    "bytes",
    "mistakes",
)
"""What `make test` runs, on 2 ranks: every stage once, and one check of each kind."""
FULL = (
    *(f"fp32 random zero{stage} clipped" for stage in range(4)),
    *(f"fp32 whole blocks zero{stage} sgd" for stage in range(4)),
    *(f"fp32 resolutions zero{stage} adamw" for stage in (1, 3)),
    "fp32 full zero0 adamw",
    "fp32 full zero3 adamw",
    "bf16 random zero1 adamw",
    "bf16 random zero3 adamw",
    "fp32 random zero1 small overlapped buckets",
    "fp32 random zero3 small overlapped buckets",
    *(() if adds_up_wrong() else ("fp32 random zero2 scattered gradients",)),
    "fp32 random zero2 offload",
    "fp32 random zero1 recompute",
    "fp32 same zero3 recompute",
    "fp32 one complete zero3 embeddings trained by complete paths",
    "fp32 one complete zero3 compiled blocks",
    *(f"names zero{stage} {precision}" for stage in range(4) for precision in ("fp32", "bf16")),
    *(f"resume fp32 zero{stage} -> zero{(stage + 3) % 4}" for stage in range(4)),
    *(f"resume bf16 zero{stage} -> zero{stage}" for stage in (1, 3)),
    *(f"overhead zero{stage}" for stage in range(4)),
    "messages zero0",
    "messages zero1",
    "scoring zero1",
    "scoring zero3",
    "choose zero3",
    "user loop zero2",
    "user loop zero3",
    "user loop zero1 compiled",
    "checkpoint zero1 probe",
    "checkpoint zero2 plan",
    "boundary zero1",
    "boundary zero2 once",
    "flat zero1",
    "flat zero2",
    "gathers",
    "one plan for all",
    "bytes",
    "mistakes",
)
"""What `make test-full` runs, on 2 ranks; more data-parallel ranks are in parallel_checks.py."""


def checks(world_size: int, choice: Choice) -> dict[str, Callable[[Control], Any]]:
    """By name."""
    matrix = whole_matrix(world_size)
    if choice == "matrix":
        return matrix
    names = QUICK if choice == "quick" else FULL
    return {name: matrix[name] for name in names}


def whole_matrix(world_size: int) -> dict[str, Callable[[Control], Any]]:
    named: dict[str, Callable[[Control], Any]] = {}
    for stage in range(4):
        for kind in ("full", "same", "random", "whole blocks", "resolutions"):
            for optimizer in ("sgd", "adamw"):
                shown = f"{kind} zero{stage} {optimizer}"
                options: Any = {"kind": kind, "stage": stage, "optimizer_name": optimizer}
                named[f"fp32 {shown}"] = partial(check_fp32, **options)
                named[f"bf16 {shown}"] = partial(check_bf16, **options)
        named[f"fp32 random zero{stage} clipped"] = partial(
            check_fp32, kind="random", stage=stage, optimizer_name="adamw", clipping=0.05
        )
        for variant, options in VARIANTS.items():
            if stage == 0 and variant != "recompute":
                continue
            kinds: tuple[str, ...] = ("random", "whole blocks")
            if variant == "recompute" and stage == 3:
                kinds = ("same",)
            elif "embeddings" in variant:
                kinds = ("one complete",)
            for kind in kinds:
                named[f"fp32 {kind} zero{stage} {variant}"] = partial(
                    check_fp32, kind=kind, stage=stage, optimizer_name="adamw", **options
                )
        for precision in ("fp32", "bf16"):
            named[f"names zero{stage} {precision}"] = partial(
                check_private_names, stage=stage, precision=precision
            )
            for resumed_by in range(4):
                named[f"resume {precision} zero{stage} -> zero{resumed_by}"] = partial(
                    check_resume, saved_by=stage, resumed_by=resumed_by, precision=precision
                )
        named[f"overhead zero{stage}"] = partial(check_overhead, stage=stage)
        named[f"messages zero{stage}"] = partial(check_message_model, stage=stage)
        named[f"scoring zero{stage}"] = partial(check_scoring, stage=stage)
        if stage in (1, 2):
            named[f"flat zero{stage}"] = partial(check_flat, stage=stage)
        named[f"choose zero{stage}"] = partial(check_choose, stage=stage)
        named[f"user loop zero{stage}"] = partial(check_user_loop, stage=stage)
        named[f"user loop zero{stage} compiled"] = partial(check_user_loop, stage=stage, compiled=True)
        for after, where in ((3, "plan"), (5, "probe")):
            named[f"checkpoint zero{stage} {where}"] = partial(
                check_user_checkpoint, stage=stage, after=after
            )
        named[f"boundary zero{stage}"] = partial(check_user_boundary, stage=stage)
        named[f"boundary zero{stage} once"] = partial(check_user_boundary, stage=stage, once=True)
    named["bf16 random zero1 buffers"] = check_bf16_of_buffers
    named["fp32 one complete zero3 compiled blocks"] = check_compiled_blocks
    named["gathers"] = check_gathers
    named["one plan for all"] = check_one_plan_for_all
    named["bytes"] = check_bytes
    named["mistakes"] = check_user_mistakes
    return named


GROUPS_OF_MESHES: list[distributed.ProcessGroup] = []
"""torch remembers meshes by their shape, with their groups."""


def clear_up() -> None:
    """Ends what a check made and nobody would: engines, held by hooks of their parameters, and groups of ranks, each of
    which keeps three threads, one of them never asleep for long. What is left is looked at no more, neither by the next
    call nor by the garbage collector: that would take longer than most checks."""
    deepspeed = sys.modules.get("deepspeed")
    kept = [distributed.group.WORLD]
    if deepspeed:
        for thing in gc.get_objects():
            if issubclass(type(thing), deepspeed.DeepSpeedEngine):
                with suppress(AttributeError):  # 0.16.4 ends with a buffer that not all of its engines have
                    thing.destroy()
            # Newer ones hook the loss, and what a tensor's hooks hold, the garbage collector does not see.
            elif type(thing).__name__ == "OutputBackwardHookManager":
                for handle in thing.hook_handles:
                    handle.remove()
        thing = None
        kept += vars(deepspeed.utils.groups).values()  # one that all its engines share
    gc.collect()
    for thing in gc.get_objects():
        if issubclass(type(thing), DeviceMesh):
            GROUPS_OF_MESHES.extend(thing.get_all_groups())
    for group in list(distributed_c10d._world.pg_map):
        if not any(group is each for each in (*kept, *GROUPS_OF_MESHES)):
            distributed.destroy_process_group(group)
    gc.freeze()


def run_checks(checks: Callable[[int, Choice], dict[str, Callable[[Control], Any]]]) -> None:
    """What a module of checks does when it is started."""
    parser = argparse.ArgumentParser()
    parser.add_argument("choice", choices=get_args(Choice))
    parser.add_argument("--only", default="", help="part of the names of the checks to run")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    control = connect(detect(), device_type="cpu")
    gc.freeze()
    results = {}
    for name, check in checks(control.world_size, options.choice).items():
        if options.only not in name:
            continue
        limit = SECONDS_A_CHECK * (5 if "compiled" in name else 1)  # making kernels takes minutes
        faulthandler.dump_traceback_later(limit, exit=True)
        if control.rank == 0:
            print(name, file=sys.stderr, flush=True)
        results[name] = check(control)
        gathered = control.all_gather(json.dumps(results[name]).encode())
        if control.rank == 0 and isinstance(results[name], float):
            results[name] = max(json.loads(part) for part in gathered)
        clear_up()
    faulthandler.cancel_dump_traceback_later()
    if control.rank == 0:
        print("RESULTS " + json.dumps(results))
    control.close()


if __name__ == "__main__":
    sys.exit(run_checks(checks))
