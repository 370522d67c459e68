"""Layouts, blocks cut by head, and pipeline stages, without ranks."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from d2ft_hpc.engines.check import check_plan
from d2ft_hpc.errors import ConfigError, PlanError
from d2ft_hpc.execution.attach import attach
from d2ft_hpc.execution.image_scaling import scaled
from d2ft_hpc.metering import measure_costs
from d2ft_hpc.model.subnets import SubnetMap
from d2ft_hpc.parallel.full_tensors import part_of
from d2ft_hpc.parallel.head_split import check_owner, cut_block, even_owner, heads_of, join_block
from d2ft_hpc.parallel.model_part import ModelPart
from d2ft_hpc.parallel.rank_layout import Placement, RankLayout
from d2ft_hpc.parallel.stages import cut_stages, describe_stages, layer_flops, stage_shares
from d2ft_hpc.planning import SkipPlan
from tests.models import DEPTH, HEADS, random_batch, tiny_vit


@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3))
def test_every_rank_has_a_place_of_its_own(stages: int, replicas: int, tensor_ranks: int) -> None:
    world = stages * replicas * tensor_ranks
    layouts = [RankLayout.of(world, rank, stages=stages, tensor_ranks=tensor_ranks) for rank in range(world)]
    places = {(layout.stage, layout.replica, layout.tensor_rank) for layout in layouts}
    assert len(places) == world
    for layout in layouts:
        place = {"stage": layout.stage, "replica": layout.replica, "tensor_rank": layout.tensor_rank}
        assert layout.rank_of(**place) == layout.rank
    assert sum(layout.leads_replica for layout in layouts) == replicas


def test_ranks_that_cannot_be_divided_are_refused() -> None:
    with pytest.raises(ConfigError, match="6 ranks cannot be divided into replicas of 4"):
        RankLayout.of(6, 0, stages=2, tensor_ranks=2)


@pytest.mark.parametrize("options", [{}, {"qkv_bias": False}, {"qk_norm": True, "init_values": 0.1}])
def test_blocks_cut_by_head_join_to_the_same_block(options: dict[str, object]) -> None:
    owner = np.array([(0, 1, 0), (1, 0, 1), (0, 0, 1), (1, 0, 0)])
    whole = tiny_vit(**options)
    subnets = SubnetMap.of(whole)
    parts = [tiny_vit(**options) for _ in range(2)]
    for rank, part in enumerate(parts):
        for index, block in enumerate(part.blocks):
            cut_block(block, subnets, heads_of(owner, index, rank))
            assert block.attn.num_heads == (owner[index] == rank).sum()
    for index, block in enumerate(whole.blocks):
        own = [dict(part.blocks[index].named_parameters()) for part in parts]
        joined = join_block(own, subnets, owner, index)
        expected = dict(block.named_parameters())
        assert set(joined) == set(expected)
        assert all(torch.equal(joined[name], expected[name]) for name in expected)
        cut = own[0]["attn.qkv.weight"].numel() + own[1]["attn.qkv.weight"].numel()
        assert cut == expected["attn.qkv.weight"].numel()


def test_a_ranks_part_of_whole_tensors_is_what_it_holds() -> None:
    """What a checkpoint gives each rank is what cutting the model gave it; all parts make the whole again."""
    owner = np.array([(0, 1, 0), (1, 0, 1), (0, 0, 1), (1, 0, 0)])
    whole = tiny_vit(qk_norm=True)
    subnets, state = SubnetMap.of(whole), dict(whole.named_parameters())
    names = {name for name in state if name.startswith("blocks.")}
    parts = []
    for rank in range(2):
        placement = Placement(RankLayout.of(2, rank, tensor_ranks=2), [range(DEPTH)], owner)
        own, cut = part_of(state, names, subnets, placement), tiny_vit(qk_norm=True)
        for index, block in enumerate(cut.blocks):
            cut_block(block, subnets, heads_of(owner, index, rank))
        expected = dict(cut.named_parameters())
        assert all(torch.equal(own[name], expected[name]) for name in names)
        parts.append(own)
    for index in range(DEPTH):
        prefix = f"blocks.{index}."
        inner = [
            {name.removeprefix(prefix): part[name] for name in part if name.startswith(prefix)}
            for part in parts
        ]
        joined = join_block(inner, subnets, owner, index)
        assert all(torch.equal(joined[name], state[prefix + name]) for name in joined)


@given(st.integers(1, 5), st.integers(1, 12), st.integers(1, 12))
def test_heads_are_shared_out_evenly(blocks: int, heads: int, ranks: int) -> None:
    if ranks > heads:
        with pytest.raises(PlanError, match="use at most"):
            even_owner(blocks, heads, ranks)
        return
    owner = even_owner(blocks, heads, ranks)
    check_owner(owner, (blocks, heads), ranks)
    counts = np.bincount(owner[0], minlength=ranks)
    assert counts.max() - counts.min() <= 1


def test_a_rank_without_a_head_is_refused() -> None:
    with pytest.raises(PlanError, match="block 1 names the ranks"):
        check_owner(np.array([[0, 1], [0, 0]]), (2, 2), 2)


def test_parts_of_a_model_compute_what_it_does() -> None:
    model = tiny_vit(class_token=True, reg_tokens=2)
    executor = attach(model)
    parts = [ModelPart(model, blocks, executor) for blocks in (range(1), range(1, 3), range(3, DEPTH))]
    names = [name for part in parts for name, _ in part.named_parameters()]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    images, labels = random_batch(0)
    operations = np.random.default_rng(0).integers(0, 3, (2, DEPTH, HEADS)).astype(np.uint8)
    executor.activate(SkipPlan(operations, 1), 0)
    for part in parts:
        part.grad_checkpointing = True
    with executor.micro_batch(1):
        expected, x = model(images), images
        for part in parts:
            x = part(x)
    assert torch.equal(x, expected)
    torch.nn.functional.cross_entropy(expected, labels).backward()
    with executor.micro_batch(0):  # the parts run again under the row of their forward, whatever runs by now
        torch.nn.functional.cross_entropy(x, labels).backward()
    own = {name: parameter for part in parts for name, parameter in part.named_parameters()}
    for name, parameter in model.named_parameters():
        if parameter.grad is None:
            assert own[name].grad is None
        else:
            torch.testing.assert_close(own[name].grad, parameter.grad)


def test_a_part_scales_images_before_whatever_embeds_them() -> None:
    """On a GPU that is a matrix product, which does not call the module of patches."""
    model, reference = tiny_vit(), tiny_vit(dynamic_img_size=True)
    executor = attach(model)
    part, seen = ModelPart(model, range(DEPTH), executor), []
    executor.activate(SkipPlan.dense(1, 1, DEPTH, HEADS).at((2, 3)), 0)
    part.patch_embed.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[-2:]))
    images, _ = random_batch(0)
    with executor.micro_batch(0):
        assert torch.equal(part(images), reference(scaled(images, (8, 12))))
        assert torch.equal(part.eval()(images), reference.eval()(images))
    assert seen == [(8, 12), (16, 16)]


@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=9), st.floats(0, 5), st.floats(0, 5), st.data())
def test_no_other_cut_has_a_faster_slowest_stage(
    blocks: list[float], below: float, above: float, data: st.DataObject
) -> None:
    stages = data.draw(st.integers(1, len(blocks)))
    flops = [below, *blocks, above]
    cut = cut_stages(flops, stages)
    assert [block for part in cut for block in part] == list(range(len(blocks)))
    assert all(len(part) > 0 for part in cut)
    edges = [0, *sorted(data.draw(st.permutations(range(1, len(blocks))))[: stages - 1]), len(blocks)]
    other = [range(*pair) for pair in itertools.pairwise(edges)]
    assert max(stage_shares(flops, cut)) <= max(stage_shares(flops, other)) + 1e-9


def test_stages_are_cut_by_measured_cost() -> None:
    model = tiny_vit()
    costs = measure_costs(model, attach(model), (3, 16, 16))
    flops = layer_flops(model, costs, (3, 16, 16))
    assert sum(flops) == pytest.approx(costs.dense_flops)
    assert len(flops) == DEPTH + 2
    assert "blocks 0-1 50." in describe_stages(flops, cut_stages(flops, 2))
    with pytest.raises(ConfigError, match="use at most 4 stages"):
        cut_stages(flops, 5)


def test_a_placement_survives_its_file(tmp_path: Path) -> None:
    layout = RankLayout.of(4, 3, stages=2, tensor_ranks=2)
    placement = Placement(layout, [range(1), range(1, 4)], even_owner(4, 3, 2))
    placement.write(tmp_path / "placement.json")
    loaded = Placement.read(tmp_path / "placement.json", layout)
    assert loaded.stages == placement.stages
    assert (loaded.owner == placement.owner).all()
    assert loaded.own.sum() == 3  # one of three heads in each of the last three blocks


def test_a_plan_for_other_ranks_or_micro_batches_is_refused() -> None:
    plan = SkipPlan.dense(3, 2, DEPTH, HEADS)
    check_plan(plan, slots=3, replicas=2, same_rows=None)
    with pytest.raises(PlanError, match="accumulates 4"):
        check_plan(plan, slots=4, replicas=2, same_rows=None)
    with pytest.raises(PlanError, match="the engine has 1"):
        check_plan(plan, slots=3, replicas=1, same_rows=None)
