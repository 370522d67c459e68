"""Blocks that run as CUDA graphs train as eager ones do, whatever a loop does between. Needs a GPU, one process."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import d2ft_hpc
from d2ft_hpc.engines.ddp import bind_ddp
from d2ft_hpc.execution.attach import attach
from d2ft_hpc.execution.block_graphs import GradientPlace
from d2ft_hpc.execution.executor import PlanExecutor
from d2ft_hpc.execution.gradients import Reduction
from d2ft_hpc.planning import Operation, SkipPlan
from tests.fused_checks import ROTARY, tiny_eva
from tests.models import DEPTH, HEADS, random_batch, tiny_vit

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

SLOTS = 3


def random_plan(seed: int) -> SkipPlan:
    operations = np.random.default_rng(seed).integers(0, 3, (SLOTS, DEPTH, HEADS), dtype=np.uint8)
    operations[0, 1] = Operation.SHORTCUT
    operations[1, :2] = Operation.FORWARD_ONLY
    operations[2] = Operation.FULL
    return SkipPlan(operations, replicas=1)


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    store: Path = tmp_path_factory.mktemp("store") / "store"
    dist.init_process_group("nccl", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


Between = Callable[[int, VisionTransformer, PlanExecutor], object]
Wrap = Callable[[VisionTransformer, PlanExecutor], nn.Module]


def trained(
    graphs: bool,
    between: Between = lambda step, model, executor: None,
    wrap: Wrap = lambda model, executor: model,
    autocast: bool = False,
    compile: bool = False,
    keeps_gradients: bool = False,
    make: Callable[..., nn.Module] = tiny_vit,
    **options: object,
) -> tuple[list[float], dict[str, Tensor], PlanExecutor]:
    """Losses and weights after steps of unequal micro-batches under plans that change, the last step's smaller."""
    torch.backends.cuda.matmul.allow_tf32 = False
    model: Any = make(**options).cuda()
    executor = attach(model, cuda_graphs=graphs, compile=compile)
    trainer = wrap(model, executor)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2, momentum=0.9)
    trainer.train()
    losses = []
    for step in range(8):
        between(step, model, executor)
        if step in (2, 5):
            executor.activate(random_plan(step), 0)
        for slot in range(SLOTS):
            images, labels = random_batch(10 * step + slot, 6 if step < 7 else 4)
            with executor.micro_batch(slot), torch.autocast("cuda", torch.bfloat16, enabled=autocast):
                loss = F.cross_entropy(trainer(images.cuda()).float(), labels.cuda()) * (slot + 1)
            with executor.micro_batch(slot):
                loss.backward()
            losses.append(float(loss))
        optimizer.step()
        optimizer.zero_grad(set_to_none=not keeps_gradients)
    whole = {
        name: tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        for name, tensor in model.state_dict().items()
    }
    return losses, whole, executor


def replays(executor: PlanExecutor) -> int:
    assert executor._replay is not None
    return len(executor._replay.graphs._chains)


def assert_same(graphs: tuple[list[float], dict[str, Tensor], PlanExecutor], eager: Sequence[object]) -> None:
    losses, weights, executor = graphs
    assert replays(executor) > 1
    assert losses == pytest.approx(eager[0], rel=1e-5)
    for name, weight in weights.items():
        torch.testing.assert_close(weight, eager[1][name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "autocast"])
@pytest.mark.parametrize("options", [{}, {"init_values": 0.1, "qk_norm": True}], ids=["plain", "scaled"])
def test_changing_plans_and_partial_batches(autocast: bool, options: dict[str, object]) -> None:
    eager, graphs = (trained(on, autocast=autocast, **options) for on in (False, True))
    assert_same(graphs, eager)


@pytest.mark.parametrize("compile", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("options", [*ROTARY[:1], {"swiglu_mlp": True, "qkv_fused": False}])
def test_rotary_positions_and_gated_mlps(compile: bool, options: dict[str, Any]) -> None:
    def make() -> nn.Module:
        return tiny_eva(0, options)

    assert_same(trained(True, make=make, compile=compile), trained(False, make=make))


def test_compiled_blocks() -> None:
    assert_same(trained(True, compile=True), trained(False))


def freeze(step: int, model: VisionTransformer, executor: PlanExecutor) -> None:
    model.blocks[step % DEPTH].mlp.fc1.weight.requires_grad_(step % 2 == 0)


def evaluate(step: int, model: VisionTransformer, executor: PlanExecutor) -> None:
    model.eval()
    with torch.no_grad():
        model(random_batch(step, 9)[0].cuda())
    model.train()


def replace_weights(step: int, model: VisionTransformer, executor: PlanExecutor) -> None:
    if step in (1, 4):  # the parameters of the optimiser stay, so that what is trained ends there
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        model.load_state_dict(state, assign=True)


def average(step: int, model: VisionTransformer, executor: PlanExecutor) -> None:
    twin = copy.deepcopy(model)
    twin.train()(random_batch(step)[0].cuda()).sum().backward()
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        one.data.lerp_(other.data + 0.001, 0.1)


def two_forwards(step: int, model: VisionTransformer, executor: PlanExecutor) -> None:
    with executor.micro_batch(0):
        losses = [model(random_batch(step + extra)[0].cuda()).square().mean() for extra in range(2)]
        (losses[0] + losses[1]).backward()


def forward_given_up(step: int, model: VisionTransformer, executor: PlanExecutor) -> None:
    with executor.micro_batch(1):
        model(random_batch(step)[0].cuda())


@pytest.mark.parametrize(
    "between",
    [freeze, evaluate, replace_weights, average, two_forwards, forward_given_up],
    ids=lambda between: between.__name__,
)
def test_what_loops_do_between(between: Between) -> None:
    eager, graphs = (trained(on, between) for on in (False, True))
    assert_same(graphs, eager)


def wrap_ddp(model: VisionTransformer, executor: PlanExecutor) -> nn.Module:
    ddp = DistributedDataParallel(model, device_ids=[0])
    d2ft_hpc.prepare(ddp, executor)
    return ddp


def wrap_ddp_in_buckets(model: VisionTransformer, executor: PlanExecutor) -> nn.Module:
    """As the DDP engine does, whose gradients the graphs add to where they are."""
    ddp = DistributedDataParallel(model, device_ids=[0], gradient_as_bucket_view=True)
    bind_ddp(ddp, executor, gradient_place=GradientPlace.OF_ENGINE)
    return ddp


def own_places(model: VisionTransformer, executor: PlanExecutor) -> nn.Module:
    executor.bind(None, Reduction.AFTER_BACKWARD, gradient_place=GradientPlace.OWN)
    return model


def wrap_fsdp(model: VisionTransformer, executor: PlanExecutor) -> nn.Module:
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    d2ft_hpc.prepare(model, executor)
    return model


@pytest.mark.parametrize("keeps", [False, True], ids=["cleared", "kept"])
@pytest.mark.parametrize("wrap", [wrap_ddp, wrap_ddp_in_buckets, own_places, wrap_fsdp])
def test_engines_with_hooks(wrap: Wrap, keeps: bool, one_rank: None) -> None:
    """keeps: gradients are set to zero after a step, not to None."""
    eager = trained(False, wrap=wrap, keeps_gradients=keeps)
    assert_same(trained(True, wrap=wrap, keeps_gradients=keeps), eager)


def test_a_gradient_is_no_buffer_of_a_graph() -> None:
    """A parameter's `.grad` that took over the graph's own tensor would change with the next replay."""
    model = tiny_vit().cuda()
    attach(model, cuda_graphs=True)
    model.train()
    model(random_batch(0)[0].cuda()).square().mean().backward()
    first = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    kept = {name: gradient.clone() for name, gradient in first.items()}
    model.zero_grad(set_to_none=True)
    model(random_batch(1)[0].cuda()).square().mean().backward()
    for name, gradient in first.items():
        assert torch.equal(gradient, kept[name]), name


def gradients_with_a_loss_between_blocks(graphs: bool, autocast: bool) -> dict[str, Tensor]:
    model = tiny_vit().cuda()
    executor = attach(model, cuda_graphs=graphs)
    executor.activate(random_plan(2), 0)
    between: list[Tensor] = []
    model.blocks[1].register_forward_hook(lambda block, inputs, output: between.append(output))
    model.train()
    for slot in range(SLOTS):
        with executor.micro_batch(slot), torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            logits = model(random_batch(slot)[0].cuda())
            (logits.square().mean() + between.pop().float().sin().sum()).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "autocast"])
def test_what_is_added_to_a_gradient_between_blocks_counts(autocast: bool) -> None:
    """Also in the sums that a block leaves for the one below."""
    eager, graphs = (gradients_with_a_loss_between_blocks(on, autocast) for on in (False, True))
    for name, gradient in eager.items():
        tolerance = (1e-2 if autocast else 1e-4) * float(gradient.abs().max())
        torch.testing.assert_close(graphs[name], gradient, rtol=0, atol=tolerance, msg=name)


def test_a_second_backward_is_refused() -> None:
    model = tiny_vit().cuda()
    attach(model, cuda_graphs=True)
    loss = model.train()(random_batch(0)[0].cuda()).square().mean()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second backward"):
        loss.backward()
