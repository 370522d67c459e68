"""Blocks under torch.compile: plans of few shapes are compiled once, others run eagerly. Guards are dynamo's own."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from d2ft_hpc.config import OptimizerConfig
from d2ft_hpc.engines.optimizer import build_optimizer, build_schedule
from d2ft_hpc.engines.plain import PlainEngine
from d2ft_hpc.execution.attach import attach
from d2ft_hpc.execution.block_runner import MOST_SHAPES
from d2ft_hpc.execution.gradients import Reduction
from d2ft_hpc.families.table import family_of
from d2ft_hpc.planning import SkipPlan
from tests.models import HEADS, random_batch, tiny, tiny_vit
from tests.reference import FORWARD_ONLY, FULL, SHORTCUT

DEPTH = 3
OUTSIDE = 2
"""Graphs of what is below the blocks, and above them."""


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """What dynamo has traced; it runs as it is, because inductor takes minutes."""
    made: list[Any] = []

    def keep(graph: Any, inputs: Any) -> Any:
        made.append(graph)
        return graph.forward

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=keep))
    yield made
    torch._dynamo.reset()


def static_plan(seed: int, rows: int = 4) -> SkipPlan:
    """One head FULL and one FORWARD_ONLY in every block; which, differs."""
    rng = np.random.default_rng(seed)
    cells = [rng.permutation([FULL, FORWARD_ONLY, SHORTCUT]) for _ in range(rows * DEPTH)]
    return SkipPlan(np.reshape(cells, (rows, DEPTH, HEADS)).astype(np.uint8), replicas=1)


def free_plan(seed: int, rows: int = 12) -> SkipPlan:
    operations = np.random.default_rng(seed).integers(0, 3, (rows, DEPTH, HEADS))
    return SkipPlan(operations.astype(np.uint8), replicas=1)


def engine_of(compile: bool) -> PlainEngine:
    model = tiny_vit(depth=DEPTH)
    executor = attach(model, compile=compile)
    config = OptimizerConfig(learning_rate=1e-2, name="sgd")
    optimizer = build_optimizer(model, config)
    return PlainEngine(model, executor, optimizer, build_schedule(optimizer, config, 9), F.cross_entropy)


def train(engine: PlainEngine, plan: SkipPlan, samples: int = 6) -> float:
    """One step on micro-batches of so many samples; its loss."""
    engine.executor.activate(plan, 0)
    return float(engine.step([random_batch(slot, samples) for slot in range(plan.slots)]).loss)


def test_a_static_plan_never_recompiles_after_its_first_step(graphs: list[Any]) -> None:
    engine, eager = engine_of(compile=True), engine_of(compile=False)
    assert train(engine, static_plan(0)) == pytest.approx(train(eager, static_plan(0)), rel=1e-6)
    # Two, as the first block's input has no gradient.
    assert engine.executor.block_shapes == len(graphs) - OUTSIDE == 2
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed, samples in enumerate((6, 4, 6)):  # an epoch's last batch is smaller
            losses = [train(each, static_plan(seed), samples) for each in (engine, eager)]
            assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert len(graphs) == 2 + OUTSIDE


@pytest.mark.full
def test_a_plan_of_too_many_shapes_runs_eagerly(graphs: list[Any]) -> None:
    engine, eager = engine_of(compile=True), engine_of(compile=False)
    assert train(engine, free_plan(0)) == pytest.approx(train(eager, free_plan(0)), rel=1e-6)
    assert engine.executor.block_shapes > MOST_SHAPES
    # Its dense blocks are compiled all the same.
    assert len(graphs) <= 2 + OUTSIDE
    before = len(graphs)
    train(engine, static_plan(0))
    assert engine.executor.block_shapes == len(graphs) - before == 2


def test_other_resolutions_run_beside_compiled_embeddings(graphs: list[Any]) -> None:
    """As planner `samples` scores them."""
    vit, plain = tiny_vit(depth=DEPTH), tiny_vit(depth=DEPTH)
    attach(vit, compile=True)
    images, _ = random_batch(0)
    vit(images)
    assert len(graphs) == 2 + OUTSIDE
    half = images[..., ::2, ::2]
    for model in (vit, plain):
        model.eval()
    torch.testing.assert_close(
        family_of(vit).of_any_size(vit)(half), family_of(plain).of_any_size(plain)(half)
    )


def mixed_rows() -> np.ndarray:
    """Blocks that are dense, that nothing trains, that run nothing, and two other shapes."""
    return np.array(
        [
            [[FORWARD_ONLY] * 3, [FULL, FORWARD_ONLY, FULL], [FULL, SHORTCUT, SHORTCUT]],
            [[FULL] * 3, [SHORTCUT] * 3, [SHORTCUT, FULL, SHORTCUT]],
        ],
        np.uint8,
    )


class Prompted(VisionTransformer):
    """As users derive models for visual prompt tuning."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.prompts = nn.Parameter(torch.zeros(1, 2, self.embed_dim))

    def forward_features(self, x: Tensor, **masks: Any) -> Tensor:
        x = self._pos_embed(self.patch_embed(x))
        return self.norm(self.blocks(torch.cat([x, self.prompts.expand(len(x), -1, -1)], 1)))


def test_a_derived_class_s_own_forward_runs(graphs: list[Any]) -> None:
    model = tiny(Prompted, 0.05)
    images, _ = random_batch(0)
    expected = model(images)
    attach(model, compile=True)
    torch.testing.assert_close(model(images), expected)
    assert graphs


@pytest.mark.parametrize(
    ("model", "options", "reduction", "expected"),
    [
        pytest.param({}, {}, Reduction.LAST_MICRO_BATCH, 4, marks=pytest.mark.full),
        pytest.param(
            {"drop_path_rate": 0.2},
            {"embeddings": "trained"},
            Reduction.AFTER_BACKWARD,
            3,
            marks=pytest.mark.full,
        ),
    ],
    ids=["gradients at one point", "drop path, trained below"],
)
def test_as_many_kernels_are_made_as_were_counted(
    graphs: list[Any],
    model: dict[str, Any],
    options: dict[str, Any],
    reduction: Reduction,
    expected: int,
) -> None:
    vit = tiny_vit(depth=DEPTH, **model)
    executor = attach(vit, compile=True, **options)
    executor.bind(None, reduction)
    executor.activate(SkipPlan(mixed_rows(), replicas=1), 0)
    for _ in range(2):
        for slot in range(2):
            images, labels = random_batch(slot)
            with executor.micro_batch(slot):
                F.cross_entropy(vit(images), labels).backward()
    assert executor.block_shapes == expected
    assert len(graphs) == expected + 1 + OUTSIDE  # and the dense block


@pytest.mark.full
def test_a_users_own_compiled_model_has_kernels_for_every_micro_batch() -> None:
    """torch goes on eagerly after 8, and says so in its log alone."""
    shapes = [(full, full + more) for full in range(HEADS + 1) for more in range(HEADS + 1 - full)]
    rows = np.zeros((len(shapes), 1, HEADS), np.uint8)
    for row, (full, runs) in zip(rows, shapes, strict=True):
        row[0, :runs], row[0, :full] = FORWARD_ONLY, FULL
    assert len(rows) > 8
    model = tiny_vit(depth=1)
    executor = attach(model)
    graphs: list[Any] = []

    def keep(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, backend=keep)
    executor.activate(SkipPlan(rows, replicas=1), 0)
    for slot in range(len(rows)):
        made = len(graphs)
        with executor.micro_batch(slot):
            compiled(random_batch(slot)[0])
        assert len(graphs) > made, slot
