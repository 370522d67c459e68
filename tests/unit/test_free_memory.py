"""A rank whose memory is too short for a dense micro-batch gets fewer FULL subnets at once, by what was measured."""

import itertools
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from d2ft_hpc.config import read_config
from d2ft_hpc.engines.build import build_engine
from d2ft_hpc.engines.plain import PlainEngine
from d2ft_hpc.execution.attach import attach
from d2ft_hpc.launch.control import SoloControl
from d2ft_hpc.launch.watch import Watch
from d2ft_hpc.lifecycle import make_plan
from d2ft_hpc.metering.activation_bytes import ActivationBytes, measure_activation_bytes
from d2ft_hpc.metering.memory import free_bytes_of_host, kept_bytes
from d2ft_hpc.parallel.rank_layout import Placement, RankLayout
from d2ft_hpc.planning import Operation, SkipPlan, solve
from d2ft_hpc.training import free_memory
from d2ft_hpc.training.job import set_up
from d2ft_hpc.training.measurements import measure_job
from d2ft_hpc.training.model_placement import place
from d2ft_hpc.training.plan_context import plan_context
from d2ft_hpc.training.plan_costs import find_costs
from d2ft_hpc.training.probe_scores import measure_scores
from tests.models import DEPTH, HEADS, tiny_vit
from tests.posing import pose_flat

SAMPLES = 4
CPU = torch.device("cpu")


def placed(rank=0, *, ranks=1, stages=1, tensor_ranks=1):
    layout = RankLayout.of(ranks, rank, stages=stages, tensor_ranks=tensor_ranks)
    edges = np.linspace(0, DEPTH, stages + 1).astype(int)
    blocks = [range(*pair) for pair in itertools.pairwise(edges)]
    return Placement(layout, blocks, np.tile(np.arange(HEADS) * tensor_ranks // HEADS, (DEPTH, 1)))


def really_kept(model, executor, operations):
    images = torch.zeros(SAMPLES, 3, *model.patch_embed.img_size)
    executor.activate(SkipPlan(operations[None], 1), 0)
    with executor.micro_batch(0):
        return kept_bytes(lambda: model(images).sum(), (*model.parameters(), *model.buffers(), images))


def test_what_a_micro_batch_keeps_is_measured():
    model = tiny_vit()
    executor = attach(model)
    size = model.patch_embed.img_size
    kept = measure_activation_bytes(model, executor, (SAMPLES, 3, *size), torch.float32)
    dense = np.full((DEPTH, HEADS), Operation.FULL, np.uint8)
    assert kept.of(DEPTH * HEADS) == pytest.approx(really_kept(model, executor, dense))
    generator = np.random.default_rng(0)
    for share in (0.2, 0.5, 0.8):
        operations = np.where(generator.random((DEPTH, HEADS)) < share, 2, generator.integers(0, 2)).astype(
            np.uint8
        )
        bound = kept.of((operations == Operation.FULL).sum())
        assert really_kept(model, executor, operations) <= 1.02 * bound


@pytest.mark.parametrize("planner", ["joint", "makespan", "depth"])
def test_a_rank_with_less_memory_is_planned_less_from_the_start(planner):
    scores = np.exp(np.random.default_rng(0).standard_normal((2, 4, DEPTH, HEADS)))
    kept = ActivationBytes(unowned=10.0, by_full=2.0)
    half = DEPTH * HEADS // 2
    limits = [free_memory.most_full(free, kept, placed(), slots=2) for free in (1e9, 10.0 + 2.0 * half + 1.0)]
    assert limits == [DEPTH * HEADS, half]

    def solved(most_full):
        problem = pose_flat(*scores, replicas=2, compute_budget=0.8, forward_cost=0.4, most_full=most_full)
        return solve(problem, planner)

    def full(plan, rank):
        return (plan.for_replica(rank) == Operation.FULL).sum(axis=(1, 2)).max()

    free, limited = solved(None), solved(limits)
    assert full(limited, 1) <= half < full(free, 1)
    np.testing.assert_array_equal(free.for_replica(0), limited.for_replica(0))
    same = solved([float(DEPTH * HEADS)] * 2)
    np.testing.assert_array_equal(free.operations, same.operations)


def test_limits_of_parts():
    kept = ActivationBytes(unowned=DEPTH * 4.0, by_full=2.0)
    whole = free_memory.most_full(1e9, kept, placed(), slots=4)
    assert whole == DEPTH * HEADS
    assert free_memory.most_full(-5.0, kept, placed(), slots=4) == 0
    assert free_memory.most_full(math.nan, kept, placed(), slots=4) == whole
    # The first of two stages keeps two micro-batches at once, the last one: each of half of the blocks.
    first, last = (placed(rank, ranks=2, stages=2) for rank in (0, 1))
    for placement, at_once in ((first, 2), (last, 1)):
        for full in range(int(placement.own.sum()) + 1):
            needed = at_once * (len(placement.blocks) * 4.0 + full * 2.0)
            assert free_memory.most_full(needed, kept, placement, slots=4) == full
    assert (
        free_memory.most_full(1e9, kept, placed(ranks=2, tensor_ranks=2), slots=4) == DEPTH * 2
    )  # of 3 heads


@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.SGD])
def test_gradients_and_optimiser_state_take_what_was_said(make):
    model = tiny_vit()
    executor = attach(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    options = {"momentum": 0.9} if make is torch.optim.SGD else {}
    optimizer = make(trained, lr=1e-3, **options)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    engine = PlainEngine(model, executor, optimizer, schedule, F.cross_entropy)
    said = engine.bytes_to_come
    executor.activate(SkipPlan.dense(1, 1, DEPTH, HEADS), 0)
    engine.step([(torch.randn(SAMPLES, 3, *model.patch_embed.img_size), torch.arange(SAMPLES) % 3)])
    gradients = sum(parameter.nbytes for parameter in trained)
    state = sum(
        value.nbytes for each in optimizer.state.values() for value in each.values() if value.dim() > 0
    )
    assert said == gradients + state
    assert engine.bytes_to_come == gradients  # which a step forgets at its end


@pytest.fixture
def watch():
    with Watch(SoloControl()) as watch:
        yield watch


def test_a_job_short_of_memory_plans_less_and_keeps_to_it_when_resumed(tmp_path, monkeypatch, watch):
    overrides = [
        f"run.folder={tmp_path}",
        "plan.planner=joint",
        "plan.compute_budget=0.9",
        "engine.name=plain",
        "engine.device=cpu",
    ]
    config, control = read_config(Path("configs/demo.yaml"), overrides), SoloControl()
    job = set_up(config, control, CPU)
    measured = measure_job(job)
    placement = place(job, None, watch)
    engine = build_engine(config, job.model, job.executor, placement, job.total_steps, job.loss, control)
    assert (
        free_memory.with_memory_limits(job, engine, placement, measured.kept, measured.plan_costs).most_full
        is None
    )

    kept, subnets = measured.kept, job.costs.num_subnets
    wanted = engine.bytes_to_come + kept.unowned + (subnets // 2 + 0.5) * kept.by_full
    monkeypatch.setattr(free_memory, "free_bytes", lambda device: wanted / (1 - free_memory.HEADROOM))
    costs = free_memory.with_memory_limits(job, engine, placement, kept, measured.plan_costs)
    assert costs.most_full == [subnets // 2]
    assert f"at most: {subnets // 2} on rank 0" in free_memory.describe_memory(costs, kept, subnets)
    scores = measure_scores(job, job.model, job.loss, watch)
    contexts = [plan_context(job, placement, each) for each in (measured.plan_costs, costs)]
    plans = [make_plan(context, scores, 0) for context in contexts]
    unlimited, limited = ((plan.operations == Operation.FULL).sum(axis=(1, 2)).max() for plan in plans)
    assert limited <= subnets // 2 < unlimited

    train = config.train.model_copy(update={"resume": True})
    resumed = replace(job, config=config.model_copy(update={"train": train}))
    monkeypatch.setattr(free_memory, "free_bytes", lambda device: 1e12)
    again = find_costs(resumed, measured.profile, measured.all_reduce)
    assert again == costs
    assert free_memory.with_memory_limits(resumed, engine, placement, kept, again) == costs

    told = read_config(Path("configs/demo.yaml"), [*overrides, "plan.memory_budget=1.0"])
    assert measure_job(replace(job, config=told)).kept is None
    assert (
        free_memory.with_memory_limits(job, engine, placement, None, measured.plan_costs)
        == measured.plan_costs
    )


@pytest.mark.parametrize("version", [1, 2])
def test_free_memory_of_a_host_is_within_the_limits_of_cgroups(tmp_path, version):
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal: 9000 kB\nMemAvailable:    8000 kB\n")
    assert free_bytes_of_host(tmp_path) == 8000 * 1024
    names = {1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
             2: ("memory.max", "memory.current", "inactive_file")}[version]  # fmt: skip
    line, top = {1: ("4:memory:/job/step", "memory"), 2: ("0::/job/step", "")}[version]
    (tmp_path / "proc/self/cgroup").write_text(f"7:cpu:/elsewhere\n{line}\n")
    step = tmp_path / "sys/fs/cgroup" / top / "job/step"
    step.mkdir(parents=True)
    for folder, limit in ((step, "max" if version == 2 else str(2**63 - 4096)), (step.parent, "5000000")):
        (folder / names[0]).write_text(f"{limit}\n")
        (folder / names[1]).write_text("3000000\n")
        (folder / "memory.stat").write_text(f"anon 1\n{names[2]} 1000000\n")
    assert free_bytes_of_host(tmp_path) == 5_000_000 - 3_000_000 + 1_000_000
    (tmp_path / "proc/meminfo").unlink()
    assert math.isnan(free_bytes_of_host(tmp_path))
