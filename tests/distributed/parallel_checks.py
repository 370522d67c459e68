"""Run under a launcher: pipelines and tensor-parallel groups train and are compared with one process.

Rank 0 prints JSON.

A check's result is the largest difference of any parameter, or a dict of facts; the tests judge them.
`--all` runs the whole matrix.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer
from torch import distributed

import d2ft_hpc
from d2ft_hpc.engines.deepspeed import deepspeed_config
from d2ft_hpc.engines.deepspeed_private import import_deepspeed
from d2ft_hpc.engines.model_parallel import CutModel
from d2ft_hpc.engines.pipeline import PipelineEngine
from d2ft_hpc.engines.plain import PlainEngine
from d2ft_hpc.engines.planned_bytes import PlannedBytes
from d2ft_hpc.engines.tensor import TensorParallelEngine
from d2ft_hpc.execution.attach import attach
from d2ft_hpc.execution.executor import EmbeddingPolicy
from d2ft_hpc.launch import Control
from d2ft_hpc.metering import meter
from d2ft_hpc.parallel.rank_layout import Placement, RankLayout
from d2ft_hpc.parallel.stages import cut_stages
from d2ft_hpc.parallel.tensor import TensorParallelExecutor
from d2ft_hpc.parallel.token_exchange import ReplicatedTokens
from d2ft_hpc.planning import SkipPlan
from d2ft_hpc.planning.communication_volume import LAYOUTS, TokenLayout
from d2ft_hpc.scores import gradient_scores
from tests.distributed import engine_checks
from tests.distributed.engine_checks import (
    STEPS,
    grids_of,
    largest_difference,
    loss_function,
    micro_batch,
    optimizer_maker,
    run_checks,
    trained_alone,
)
from tests.distributed.launching import Choice
from tests.models import DEPTH, HEADS, tiny_vit

SLOTS = 3
EPSILON = {**engine_checks.EPSILON, "fp32": 1e-5}
"""Of AdamW, by precision. It turns a gradient's rounding into up to lr / epsilon times as much: in fp32 with 1e-6, one
process itself is 4e-6 from fp64, and a model cut by head, which rounds in other places, is no better and no worse
(analysis/engines)."""

KINDS = ("full", "same", "random", "whole blocks", "whole stages")
SCALED = (*KINDS, "resolutions")
"""Where every rank holds all tokens."""


def plan_of(kind: str, step: int, replicas: int) -> SkipPlan:
    """Rows [slot * replicas + replica]; for every kind but "full" and "same" they differ between replicas."""
    rng = np.random.default_rng((11, step))
    operations = rng.integers(0, 3, (SLOTS * replicas, DEPTH, HEADS)).astype(np.uint8)
    if kind == "full":
        operations[:] = 2
    elif kind == "same":
        operations = np.repeat(operations[:SLOTS], replicas, axis=0)
    elif kind == "whole blocks":
        operations[rng.random((SLOTS * replicas, DEPTH)) < 0.5] = 0
        operations[rng.random((SLOTS * replicas, DEPTH)) < 0.3] = 1
        operations[:, 1] = 0  # a block that nobody runs
        operations[:, 2, 1:] = 0  # a block that one head alone runs
    elif kind == "whole stages":
        operations[0, : DEPTH // 2] = 0
        operations[1, DEPTH // 2 :] = 0
        operations[1, : DEPTH // 2] = 1  # nothing of the first stage is trained
        operations[2] = 0
    return SkipPlan(operations, replicas, grids=grids_of(kind, rng, len(operations)))


def owner_of(tensor_ranks: int) -> np.ndarray:
    """Uneven and in no order: the ranks hold other heads, and other numbers of them, in each block."""
    rows = [(0, 1, 0), (1, 0, 1), (0, 0, 1), (1, 0, 0)] if tensor_ranks == 2 else [(0,) * HEADS] * DEPTH
    return np.array(rows)


def build(
    control: Control,
    model: VisionTransformer,
    optimizer_name: str,
    *,
    stages: int,
    tensor_ranks: int,
    zero: int = 0,
    precision: str = "fp32",
    clipping: float | None = None,
    recompute: bool = False,
    token_layout: TokenLayout = "replicated",
    embeddings: EmbeddingPolicy = "frozen",
    **more: Any,
) -> PipelineEngine | TensorParallelEngine:
    """more: of the precision's section of DeepSpeed's configuration."""
    model.set_grad_checkpointing(recompute)
    executor = attach(model, embeddings=embeddings)
    layout = RankLayout.of(control.world_size, control.rank, stages=stages, tensor_ranks=tensor_ranks)
    placement = Placement(layout, cut_stages([0.1, *[1.0] * DEPTH, 0.1], stages), owner_of(tensor_ranks))
    config = deepspeed_config(
        {"zero_optimization": {"stage": zero}},
        micro_batch_size=4,
        slots=SLOTS,
        precision=precision,
        gradient_clipping=clipping,
    )
    if more:
        config[precision] = {**config[precision], **more}

    make_optimizer = optimizer_maker(optimizer_name, EPSILON[precision])

    kind = PipelineEngine if stages > 1 else TensorParallelEngine
    engine = kind(CutModel(model, executor, placement, control, make_optimizer), loss_function, config)
    if isinstance(engine.executor, TensorParallelExecutor):
        engine.executor.use(token_layout)
    return engine


def trained(
    control: Control, model: VisionTransformer, optimizer_name: str, kind: str, **options: Any
) -> Any:
    """The whole model's parameters after some steps, gathered on every rank."""
    engine = build(control, model, optimizer_name, **options)
    layout = RankLayout.of(
        control.world_size, control.rank, stages=options["stages"], tensor_ranks=options["tensor_ranks"]
    )
    for step in range(STEPS):
        plan = plan_of(kind, step, layout.replicas)
        engine.executor.activate(plan, layout.replica)
        rows = [slot * layout.replicas + layout.replica for slot in range(SLOTS)]
        engine.step([micro_batch(step, row, plan.num_rows) for row in rows])
    with engine.full_model() as full:
        return dict(full.named_parameters())


def reference(
    model: VisionTransformer,
    optimizer_name: str,
    kind: str,
    clipping: float | None,
    replicas: int,
    embeddings: EmbeddingPolicy = "frozen",
    precision: str = "fp32",
) -> Any:
    """What one process gets from the same rows, in the model's own precision; `precision` is that of the ranks."""
    plans = [plan_of(kind, step, replicas) for step in range(STEPS)]
    make = optimizer_maker(optimizer_name, EPSILON[precision])
    return trained_alone(model, plans, make, clipping, embeddings)


def check_fp32(
    control: Control, kind: str, optimizer_name: str, qk_norm: bool = False, **options: Any
) -> float:
    """Largest difference from one process."""
    # A key bias has a gradient of zero, except for rounding, which AdamW would turn into steps of full size.
    model_options = {"qkv_bias": optimizer_name == "sgd", "qk_norm": qk_norm, "init_values": 0.5}
    own = trained(control, tiny_vit(**model_options), optimizer_name, kind, **options)
    replicas = control.world_size // (options["stages"] * options["tensor_ranks"])
    one = tiny_vit(**model_options)
    embeddings = options.get("embeddings", "frozen")
    expected = reference(one, optimizer_name, kind, options.get("clipping"), replicas, embeddings)
    return largest_difference(own, expected)


def check_bf16(control: Control, kind: str, optimizer_name: str, **options: Any) -> dict[str, float]:
    """Root-mean-square distance from fp64, of the plan and of the dense model under the same engine."""
    replicas = control.world_size // (options["stages"] * options["tensor_ranks"])
    model_options = {"qkv_bias": optimizer_name == "sgd"}

    def error(of_kind: str) -> float:
        own = trained(
            control, tiny_vit(**model_options), optimizer_name, of_kind, precision="bf16", **options
        )
        model = tiny_vit(**model_options).double()
        exact = reference(model, optimizer_name, of_kind, None, replicas, precision="bf16")
        squares = [(own[name].double() - exact[name]).square().flatten() for name in exact]
        return float(torch.cat(squares).mean().sqrt().detach())

    return {"plan": error(kind), "dense": error("full")}


def check_missing_gradients(control: Control) -> dict[str, list[list[float]]]:
    """Gradient norms [step][rank] of a bf16 pipeline without ZeRO whose first stage no replica trains in the first step
    and one replica alone in the second; beside one process in fp32."""
    # With the latter, DeepSpeed takes no gradient but from a backward.
    options: Any = {"precision": "bf16", "immediate_grad_update": True}
    engine = build(control, tiny_vit(), "sgd", stages=2, tensor_ranks=1, **options)
    layout = RankLayout.of(control.world_size, control.rank, stages=2, tensor_ranks=1)
    one = tiny_vit()
    plain = PlainEngine(one, attach(one), *optimizer_maker("sgd", EPSILON["bf16"])(one), loss_function)
    found: dict[str, list[list[float]]] = {"ranks": [], "one process": []}
    for step in range(2):
        operations = np.full((SLOTS, layout.replicas, DEPTH, HEADS), 2, np.uint8)
        operations[:, step:, : DEPTH // 2] = 1
        plan = SkipPlan(operations.reshape(-1, DEPTH, HEADS), layout.replicas)
        batch = [micro_batch(step, row, plan.num_rows) for row in range(plan.num_rows)]
        engine.executor.activate(plan, layout.replica)
        own = np.array(engine.step(batch[layout.replica :: layout.replicas]).gradient_norm)
        found["ranks"].append([float(np.frombuffer(part)[0]) for part in control.all_gather(own.tobytes())])
        plain.executor.activate(replace(plan, replicas=1), 0)
        found["one process"].append([float(plain.step(batch).gradient_norm)])
    return found


def check_scoring(control: Control, **options: Any) -> dict[str, float]:
    """Logits at half the resolution through a cut model, from timm's model with its weights; and training between such
    passes, from one process."""
    layouts = [
        RankLayout.of(
            control.world_size, rank, stages=options["stages"], tensor_ranks=options["tensor_ranks"]
        )
        for rank in range(control.world_size)
    ]
    layout = layouts[control.rank]
    engine = build(control, tiny_vit(), "sgd", **options)
    differences = []
    for step in range(STEPS):
        plan = plan_of("random", step, layout.replicas)
        rows = [slot * layout.replicas + layout.replica for slot in range(SLOTS)]
        batch = [micro_batch(step, row, plan.num_rows) for row in rows]
        small = [F.interpolate(images, 8) for images, _ in batch]
        logits = torch.cat(engine.logits(small))
        timm_model = tiny_vit(dynamic_img_size=True).eval()
        with engine.full_model() as full, torch.no_grad():
            timm_model.load_state_dict(full.state_dict())
            differences.append(float((logits - timm_model(torch.cat(small))).abs().max()))
        engine.executor.activate(plan, layout.replica)
        engine.step(batch)
    with engine.full_model() as full:
        own = dict(full.named_parameters())
    of_ranks = control.all_gather(logits.numpy().tobytes())
    different = {(each.replica, packed) for each, packed in zip(layouts, of_ranks, strict=True)}
    return {
        "logits": max(differences),
        "parameters": largest_difference(own, reference(tiny_vit(), "sgd", "random", None, layout.replicas)),
        "different logits in a replica": len(different) - layout.replicas,
    }


def check_user_loop(control: Control, zero: int, **options: Any) -> dict[str, float]:
    """`d2ft_hpc.initialize` cuts the model for a loop of the user's own, measures, plans and trains, and saves."""
    stages, tensor_ranks = options["stages"], options["tensor_ranks"]
    layout = RankLayout.of(control.world_size, control.rank, stages=stages, tensor_ranks=tensor_ranks)
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": SLOTS,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": zero},
        "zero_allow_untested_optimizer": True,
        "tensor_parallel": {"autotp_size": tensor_ranks},
        "steps_per_print": 10**9,  # without it, 0.16.4 fails after the first step
        "d2ft": {"planner": "joint", "compute_budget": 0.6},
    }
    model = tiny_vit(seed=control.rank)  # rank 0's weights count
    given = d2ft_hpc.PipelineModule(model, loss_function, stages) if stages > 1 else model
    engine, *_ = d2ft_hpc.initialize(
        model=given,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.05),
        model_parameters=model.parameters(),
        config=config,
    )
    rows = [slot * layout.replicas + layout.replica for slot in range(SLOTS)]
    for step in range(STEPS):
        batch = [micro_batch(step, row, SLOTS * layout.replicas) for row in rows]
        if stages > 1:
            engine.train_batch(iter(batch))
            continue
        for images, labels in batch:
            engine.backward(loss_function(engine(images), labels))
            engine.step()
    folder = Path(control.broadcast(tempfile.mkdtemp().encode()).decode())
    engine.d2ft.save(folder)
    control.barrier(30)

    one = tiny_vit()
    executor = attach(one)
    optimizer = torch.optim.SGD(one.parameters(), lr=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    plain = PlainEngine(one, executor, optimizer, schedule, loss_function)
    every = range(SLOTS * layout.replicas)
    batches = [[micro_batch(step, row, len(every)) for row in every] for step in range(STEPS)]
    fisher = [
        gradient_scores(one, executor.subnets, *pair, loss_function, ["fisher"])["fisher"]
        for pair in batches[0]
    ]
    for step, whole_batch in enumerate(batches):
        if step == 1:
            executor.activate(SkipPlan(engine.d2ft.plan.operations, replicas=1), 0)
        plain.step(whole_batch)
    scores = torch.from_numpy(engine.d2ft.scores.forward.copy())
    return {
        "parameters": largest_difference(
            load_file(folder / "model.safetensors"), dict(one.named_parameters())
        ),
        "scores": float((scores / torch.cat(fisher) - 1).abs().max()),
        "skipped": float((engine.d2ft.plan.operations < 2).mean()),
    }


def check_messages(control: Control) -> dict[str, Any]:
    """Collectives of one tensor-parallel step, by the plan's rows."""
    engine = build(control, tiny_vit(), "sgd", stages=1, tensor_ranks=2)
    sent = {}
    rows = {"full": 2, "forward only": 1, "shortcut": 0}
    for name, operation in rows.items():
        engine.executor.activate(SkipPlan(np.full((SLOTS, DEPTH, HEADS), operation, np.uint8), 1), 0)
        with meter() as metered:
            engine.step([micro_batch(0, slot, SLOTS) for slot in range(SLOTS)])
        sent[name] = metered.bytes_sent
    lonely = np.zeros((SLOTS, DEPTH, HEADS), np.uint8)
    lonely[:, :, 0] = 2
    engine.executor.activate(SkipPlan(lonely, 1), 0)
    with meter() as metered:
        engine.step([micro_batch(0, slot, SLOTS) for slot in range(SLOTS)])
    sent["one head"] = metered.bytes_sent
    return {"sent": sent, "one sum": 4 * 17 * 48 * 4}


def check_sent(
    control: Control, *, stages: int, tensor_ranks: int, token_layout: TokenLayout
) -> dict[str, dict[str, float]]:
    """Bytes of a step over all ranks, by kind of plan: counted where they are sent, and by the message model."""
    model = tiny_vit(qk_norm=True, init_values=0.5)
    options = {"stages": stages, "tensor_ranks": tensor_ranks, "token_layout": token_layout}
    engine = build(control, model, "sgd", **options)
    layout = RankLayout.of(control.world_size, control.rank, stages=stages, tensor_ranks=tensor_ranks)
    told = PlannedBytes(
        model,
        engine.executor,
        SimpleNamespace(
            placement=Placement(
                layout, cut_stages([0.1, *[1.0] * DEPTH, 0.1], stages), owner_of(tensor_ranks)
            ),
            slots=SLOTS,
            micro_batch_size=4,
        ),
        precision="fp32",
        data_parallel="zero0",
    )
    sent = {}
    for kind in SCALED if token_layout == "replicated" else KINDS:
        plan = plan_of(kind, 0, layout.replicas)
        engine.executor.activate(plan, layout.replica)
        rows = [slot * layout.replicas + layout.replica for slot in range(SLOTS)]
        batch = [micro_batch(0, row, plan.num_rows) for row in rows]
        if kind == KINDS[0]:
            engine.step(batch)  # what is sent once only
        with meter() as metered:
            engine.step(batch)
        own = np.array([sum(metered.bytes_sent.values()), told.of(plan, token_layout)])
        of_ranks = [np.frombuffer(part) for part in control.all_gather(own.tobytes())]
        sent[kind] = dict(zip(("counted", "told"), np.sum(of_ranks, axis=0).tolist(), strict=True))
    return sent


def check_lone_senders(control: Control) -> list[bool]:
    """Whether every rank has what a lone sender gave, for each sender and for tensors of few and of many numbers."""
    import_deepspeed().init_distributed(auto_mpi_discovery=False)
    messages = ReplicatedTokens(distributed.group.WORLD, control.rank)
    found = []
    for sender in range(control.world_size):
        for shape in ((3,), (4, 17, 48)):
            generator = torch.Generator().manual_seed(sender)
            given = torch.randn(shape, generator=generator)
            own = given.clone() if control.rank == sender else torch.zeros(shape)
            same = torch.equal(messages.sum(own, (sender,)), given)
            found.append(all(json.loads(part) for part in control.all_gather(json.dumps(same).encode())))
    return found


QUICK = (
    "lone senders",
    "fp32 pp2 tp1 whole stages sgd zero=0",
    "user loop pp2 tp1 zero1",
    "sent pp2 tp1 replicated",
    "missing gradients",
    "fp32 pp1 tp2 random adamw clipping=0.05",
    "fp32 pp1 tp2 whole stages sgd zero=1 token_layout=sharded",
    "bf16 pp1 tp2 whole blocks sgd zero=1",
    "scoring pp1 tp2 zero3",
    "sent pp1 tp2 sharded",
    "messages",
)
"""What `make test` runs, on 2 ranks: a pipeline and tensor-parallel ranks once, and one check of each kind."""
FULL = (
    "lone senders",
    "fp32 pp2 tp1 random adamw zero=1",
    "fp32 pp2 tp1 whole stages sgd zero=0",
    "user loop pp2 tp1 zero1",
    "sent pp2 tp1 replicated",
    "fp32 pp1 tp2 whole blocks adamw zero=1",
    "fp32 pp1 tp2 random adamw zero=2",
    "fp32 pp1 tp2 random adamw zero=3",
    "fp32 pp1 tp2 random adamw zero=2 embeddings=complete_path token_layout=sharded",
    "fp32 pp1 tp2 whole stages sgd zero=1 token_layout=sharded",
    "fp32 pp1 tp2 whole blocks adamw zero=1 token_layout=overlapped",
    "scoring pp1 tp2 zero3",
    "user loop pp1 tp2 zero3",
    "sent pp1 tp2 replicated",
    "fp32 pp2 tp2 random adamw clipping=0.05",
    "fp32 pp2 tp2 whole stages sgd recompute=True",
    "fp32 pp2 tp2 whole blocks adamw zero=1 qk_norm=True",
    "bf16 pp2 tp2 whole blocks sgd zero=1",
    "fp32 pp2 tp2 random sgd clipping=0.05 embeddings=trained qk_norm=True token_layout=sharded",
    "fp32 pp2 tp2 whole stages sgd recompute=True token_layout=overlapped",
    "bf16 pp2 tp2 whole blocks sgd token_layout=sharded",
    "bf16 pp2 tp2 random sgd zero=0 token_layout=overlapped",
    "missing gradients",
    "scoring pp2 tp2 zero1",
    "fp32 pp2 tp2 resolutions adamw zero=1",
    "sent pp2 tp2 replicated",
    "sent pp2 tp2 sharded",
    "sent pp2 tp2 overlapped",
    "fp32 pp4 tp1 whole stages sgd zero=0",
)
"""What `make test-full` runs, on 4 ranks."""


def checks(world_size: int, choice: Choice) -> dict[str, Callable[[Control], Any]]:
    """By name."""
    matrix = whole_matrix(world_size)
    if choice == "matrix":
        return matrix
    return {name: matrix[name] for name in (QUICK if choice == "quick" else FULL)}


def whole_matrix(world_size: int) -> dict[str, Callable[[Control], Any]]:
    layouts = {2: [(2, 1), (1, 2)], 4: [(2, 1), (1, 2), (2, 2), (4, 1)]}[world_size]
    named: dict[str, Callable[[Control], Any]] = {}

    def add(
        kind: str, stages: int, tensor: int, optimizer: str, precision: str = "fp32", **more: Any
    ) -> None:
        extra = "".join(f" {key}={value}" for key, value in more.items())
        name = f"{precision} pp{stages} tp{tensor} {kind} {optimizer}{extra}"
        check = check_fp32 if precision == "fp32" else check_bf16
        options = {"stages": stages, "tensor_ranks": tensor, **more}
        named[name] = lambda control: check(control, kind, optimizer, **options)

    for stages, tensor in layouts:
        for kind in SCALED:
            for optimizer in ("sgd", "adamw"):
                for precision in ("fp32", "bf16"):
                    for zero in (0, 1):
                        add(kind, stages, tensor, optimizer, precision, zero=zero)
        zero = 3 if stages == 1 else 1
        options = {"stages": stages, "tensor_ranks": tensor, "zero": zero}
        named[f"scoring pp{stages} tp{tensor} zero{zero}"] = partial(check_scoring, **options)
        named[f"user loop pp{stages} tp{tensor} zero{zero}"] = partial(check_user_loop, **options)
        add("random", stages, tensor, "adamw", clipping=0.05)
        add("random", stages, tensor, "sgd", zero=1, clipping=0.05)
        if stages > 1:
            add("whole stages", stages, tensor, "sgd", recompute=True)
        if tensor > 1:
            add("whole blocks", stages, tensor, "adamw", zero=1, qk_norm=True)
            for token_layout in LAYOUTS[1:]:
                _add_sharded(add, stages, tensor, token_layout)
        if tensor > 1 and stages == 1:
            for zero in (2, 3):
                add("random", stages, tensor, "adamw", zero=zero)
                add("whole blocks", stages, tensor, "sgd", zero=zero)
                add("whole blocks", stages, tensor, "sgd", "bf16", zero=zero)
        for token_layout in LAYOUTS if tensor > 1 else LAYOUTS[:1]:
            sending = {"stages": stages, "tensor_ranks": tensor, "token_layout": token_layout}
            named[f"sent pp{stages} tp{tensor} {token_layout}"] = partial(check_sent, **sending)
    named["missing gradients"] = check_missing_gradients
    named["lone senders"] = check_lone_senders
    if world_size == 2:
        named["messages"] = check_messages
    return named


def _add_sharded(add: Callable[..., None], stages: int, tensor: int, token_layout: TokenLayout) -> None:
    """Ranks that each hold their own of the 17 tokens, which no number of ranks here divides."""
    sharded = {"token_layout": token_layout}
    for kind in KINDS:
        for optimizer in ("sgd", "adamw"):
            for precision in ("fp32", "bf16"):
                add(kind, stages, tensor, optimizer, precision, zero=stages % 2, **sharded)
    add("random", stages, tensor, "sgd", clipping=0.05, embeddings="trained", qk_norm=True, **sharded)
    add("whole blocks", stages, tensor, "sgd", "bf16", **sharded)
    if stages > 1:
        add("whole stages", stages, tensor, "sgd", recompute=True, **sharded)
    else:
        for zero in (2, 3):
            add("random", stages, tensor, "adamw", zero=zero, embeddings="complete_path", **sharded)


if __name__ == "__main__":
    sys.exit(run_checks(checks))
