"""Skip execution against plain autograd."""

from __future__ import annotations

import copy
import gc
import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import timm.utils
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint_sequential

import d2ft_hpc
from d2ft_hpc.errors import PlanError, UnsupportedModelError
from d2ft_hpc.execution import optimizer_steps
from d2ft_hpc.execution.attach import attach
from d2ft_hpc.execution.gradients import Reduction
from d2ft_hpc.planning.plan import SkipPlan
from tests.models import DEPTH, HEADS, random_batch, tiny_vit
from tests.reference import FORWARD_ONLY, FULL, SHORTCUT, reference_forward

VARIANTS = {
    "plain": {},
    "layer scale, q/k norm, registers": {"init_values": 0.1, "qk_norm": True, "reg_tokens": 2},
    "no biases, average pooling": {
        "qkv_bias": False,
        "proj_bias": False,
        "global_pool": "avg",
        "class_token": False,
    },
    "pre-norm, fc_norm": {"pre_norm": True, "fc_norm": True},
    "unequal shares of hidden units": {"mlp_ratio": 4.1},
}


def special_rows() -> dict[str, np.ndarray]:
    """Rows [block, head] at the edges, and random ones."""
    rng = np.random.default_rng(3)
    last_skipped = rng.integers(0, 3, (DEPTH, HEADS))
    last_skipped[-1] = SHORTCUT
    first_forward_only = rng.integers(0, 3, (DEPTH, HEADS))
    first_forward_only[0] = FORWARD_ONLY
    alternating = np.array([[FULL] * HEADS, [SHORTCUT] * HEADS] * (DEPTH // 2))
    rows = {
        "all full": np.full((DEPTH, HEADS), FULL),
        "all forward only": np.full((DEPTH, HEADS), FORWARD_ONLY),
        "all shortcut": np.full((DEPTH, HEADS), SHORTCUT),
        "whole blocks": alternating,
        "last block skipped": last_skipped,
        "first block forward only": first_forward_only,
        "full and shortcut": np.array([[FULL, SHORTCUT, FULL]] * DEPTH),
        "forward only and shortcut": np.array([[FORWARD_ONLY, SHORTCUT, SHORTCUT]] * DEPTH),
    }
    for seed in range(6):
        rows[f"random {seed}"] = np.random.default_rng(seed).integers(0, 3, (DEPTH, HEADS))
    return {name: row.astype(np.uint8) for name, row in rows.items()}


def loss_and_gradients(model, forward, images, labels):
    model.zero_grad(set_to_none=True)
    loss = F.cross_entropy(forward(images).float(), labels)
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}


def planned(model: VisionTransformer, row: np.ndarray, **options):
    executor = attach(model, embeddings="trained", **options)
    executor.activate(SkipPlan(row[None], replicas=1), replica=0)
    return executor


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("row", special_rows().values(), ids=special_rows())
def test_gradients_equal_reference_in_fp32(variant: str, row: np.ndarray) -> None:
    reference = tiny_vit(**VARIANTS[variant])
    model = copy.deepcopy(reference)
    images, labels = random_batch(1)
    executor = planned(model, row)
    with executor.micro_batch(0):
        loss, gradients = loss_and_gradients(model, model, images, labels)
    expected_loss, expected = loss_and_gradients(
        reference, lambda x: reference_forward(reference, x, row), images, labels
    )
    torch.testing.assert_close(loss, expected_loss, rtol=1e-6, atol=1e-6)
    for name, gradient in expected.items():
        own = gradients[name]
        assert (own is None) == (gradient is None), name
        if gradient is not None and own is not None:
            scale = max(1.0, float(gradient.abs().max()))
            assert float((own - gradient).abs().max()) <= 1e-6 * scale, name


@pytest.mark.parametrize("row", special_rows().values(), ids=special_rows())
def test_bf16_error_is_at_most_twice_the_dense_engines(row: np.ndarray) -> None:
    exact, half = tiny_vit().double(), tiny_vit().bfloat16()
    images, labels = random_batch(2)

    def error_under(operations: np.ndarray, attached: bool) -> float:
        model = copy.deepcopy(half)
        executor = planned(model, operations) if attached else None
        if executor is None:
            _, gradients = loss_and_gradients(model, model, images.bfloat16(), labels)
        else:
            with executor.micro_batch(0):
                _, gradients = loss_and_gradients(model, model, images.bfloat16(), labels)
        copied = copy.deepcopy(exact)
        _, expected = loss_and_gradients(
            copied, lambda x: reference_forward(copied, x, operations), images.double(), labels
        )
        differences = [
            (gradients[name].double() - gradient).square().sum()
            for name, gradient in expected.items()
            if gradient is not None
        ]
        norms = [gradient.square().sum() for gradient in expected.values() if gradient is not None]
        return float(torch.stack(differences).sum().sqrt() / torch.stack(norms).sum().sqrt())

    dense_error = error_under(np.full((DEPTH, HEADS), FULL, np.uint8), attached=False)
    assert error_under(row, attached=True) <= 2 * dense_error


def test_all_full_is_the_dense_model_bit_for_bit() -> None:
    dense = tiny_vit()
    model = copy.deepcopy(dense)
    executor = planned(model, np.full((DEPTH, HEADS), FULL, np.uint8))
    images, labels = random_batch(1)
    with executor.micro_batch(0):
        loss, gradients = loss_and_gradients(model, model, images, labels)
    expected_loss, expected = loss_and_gradients(dense, dense, images, labels)
    assert torch.equal(loss, expected_loss)
    for name, gradient in expected.items():
        assert torch.equal(gradients[name], gradient), name


def test_evaluation_is_dense_and_names_and_weights_stay_timms() -> None:
    dense = tiny_vit()
    model = copy.deepcopy(dense)
    planned(model, np.zeros((DEPTH, HEADS), np.uint8))
    images, _ = random_batch(1)
    assert torch.equal(model.eval()(images), dense.eval()(images))
    assert list(model.state_dict()) == list(dense.state_dict())
    tiny_vit(seed=5).load_state_dict(model.state_dict(), strict=True)


def test_skipped_heads_store_nothing_for_backward() -> None:
    images, labels = random_batch(1, samples=16)

    def stored_bytes(row: np.ndarray) -> int:
        model = tiny_vit()
        executor = planned(model, row)
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        stored: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if tensor.is_floating_point() and storage.data_ptr() not in weights:
                stored[storage.data_ptr()] = storage.nbytes()
            return tensor

        with executor.micro_batch(0), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            F.cross_entropy(model(images), labels)
        return sum(stored.values())

    nothing = stored_bytes(np.full((DEPTH, HEADS), SHORTCUT, np.uint8))
    assert stored_bytes(np.full((DEPTH, HEADS), FORWARD_ONLY, np.uint8)) == nothing
    one_full = np.full((DEPTH, HEADS), FORWARD_ONLY, np.uint8)
    one_full[:, 0] = FULL
    with_shortcuts = np.where(one_full == FORWARD_ONLY, SHORTCUT, one_full).astype(np.uint8)
    two_full = one_full.copy()
    two_full[:, 2] = FULL
    one, two, dense = map(stored_bytes, (one_full, two_full, np.full((DEPTH, HEADS), FULL, np.uint8)))
    assert one == stored_bytes(with_shortcuts) < dense
    assert dense - two == two - one  # no copies of the weights of some heads


def test_micro_batches_follow_their_own_rows_with_activation_checkpointing() -> None:
    rows = np.random.default_rng(0).integers(0, 3, (3, DEPTH, HEADS)).astype(np.uint8)
    reference = tiny_vit()
    model = copy.deepcopy(reference)
    model.set_grad_checkpointing()
    executor = attach(model, embeddings="trained")
    executor.activate(SkipPlan(rows, replicas=1), replica=0)
    for slot, row in enumerate(rows):
        images, labels = random_batch(slot)
        with executor.micro_batch(slot):
            F.cross_entropy(model(images), labels).backward()
        F.cross_entropy(reference_forward(reference, images, row), labels).backward()
    for (name, parameter), other in zip(model.named_parameters(), reference.parameters(), strict=True):
        if other.grad is None:
            assert parameter.grad is None, name
        else:
            torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-5, atol=1e-6)


def _blocks_again(model: VisionTransformer, images: Tensor) -> Tensor:
    model.set_grad_checkpointing()
    return model(images)


def _halves_again(model: VisionTransformer, images: Tensor) -> Tensor:
    x = model._pos_embed(model.patch_embed(images))
    x = checkpoint_sequential(model.blocks, 2, x, use_reentrant=False)
    return model.forward_head(model.norm(x))


@pytest.mark.parametrize("forward", [_blocks_again, _halves_again])
def test_blocks_run_again_as_they_did_after_other_micro_batches_ran(forward: Callable[..., Tensor]) -> None:
    """As where one loss compares what two micro-batches gave."""
    rows = np.random.default_rng(0).integers(0, 3, (3, DEPTH, HEADS)).astype(np.uint8)
    reference = tiny_vit().double()
    model = copy.deepcopy(reference)
    executor = attach(model, embeddings="trained")
    executor.activate(SkipPlan(rows, replicas=1), replica=0)
    batches = [random_batch(slot) for slot in range(3)]
    losses: list[Tensor] = []
    executor.bind(lambda: len(losses) if len(losses) < 3 else 2, Reduction.AFTER_BACKWARD)
    for images, labels in batches:
        losses.append(F.cross_entropy(forward(model, images.double()), labels))
    torch.stack(losses).sum().backward()
    for (images, labels), row in zip(batches, rows, strict=True):
        F.cross_entropy(reference_forward(reference, images.double(), row), labels).backward()
    for (name, parameter), other in zip(model.named_parameters(), reference.parameters(), strict=True):
        own = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        expected = torch.zeros_like(parameter) if other.grad is None else other.grad
        torch.testing.assert_close(own, expected, rtol=1e-10, atol=1e-12, msg=name)


def _double(*given: Any) -> Any:
    return 2 * given[-1]


@pytest.mark.parametrize("name", ["blocks.1", "patch_embed"])
def test_a_forward_of_a_module_s_own_is_neither_lost_nor_replaced(name: str) -> None:
    model = tiny_vit()
    library_s = model.get_submodule(name).forward
    model.get_submodule(name).forward = lambda x, **kwargs: _double(library_s(x, **kwargs))
    images, _ = random_batch(0)
    expected = model(images)
    with pytest.raises(UnsupportedModelError, match=rf"^{name} has a forward that was set on the module"):
        attach(model)
    assert torch.equal(model(images), expected)
    del model.get_submodule(name).forward
    attach(model)
    followed = model.get_submodule(name).forward
    model.get_submodule(name).forward = lambda x, **kwargs: _double(followed(x, **kwargs))
    assert torch.equal(model(images), expected)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda block: block.attn.register_forward_hook(_double), "attn of block 1 has a hook"),
        (lambda block: prune.l1_unstructured(block.mlp.fc1, "weight", 0.5), "mlp.fc1 of block 1 has a hook"),
        (
            lambda block: setattr(block.attn, "forward", lambda x, **_: x),
            "attn of block 1 has a forward of its own",
        ),
    ],
)
def test_what_hooks_add_to_a_block_s_modules_is_not_left_out(change: Callable[..., Any], what: str) -> None:
    model = tiny_vit()
    change(model.blocks[1])
    images, _ = random_batch(0)
    expected = model(images)
    executor = attach(model)
    rows = np.full((1, DEPTH, HEADS), FULL, np.uint8)
    rows[0, 0] = SHORTCUT
    executor.activate(SkipPlan(rows, replicas=1), replica=0)  # it skips another block
    rows[0, 1, 0] = FORWARD_ONLY
    with pytest.raises(PlanError, match=f"^{what}, which would not run"):
        executor.activate(SkipPlan(rows, replicas=1), replica=0)
    executor.activate(SkipPlan.dense(1, 1, DEPTH, HEADS), replica=0)
    with executor.micro_batch(0):
        assert torch.equal(model(images), expected)


def test_autocast_inside_one_context_keeps_gradients() -> None:
    """A leaf cast without gradient in one micro-batch must not be reused by the next from autocast's cache."""
    rows = np.array([[[FORWARD_ONLY] * HEADS] * DEPTH, [[FULL, FULL, SHORTCUT]] * DEPTH], np.uint8)
    model = tiny_vit()
    executor = attach(model)
    executor.activate(SkipPlan(rows, replicas=1), replica=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for slot in range(2):
            images, labels = random_batch(slot)
            with executor.micro_batch(slot):
                loss = F.cross_entropy(model(images), labels)
    loss.backward()
    for name in ("attn.proj.bias", "mlp.fc2.bias", "attn.qkv.weight", "norm1.weight"):
        assert model.blocks[1].get_parameter(name).grad is not None, name


@pytest.mark.parametrize("policy", ["frozen", "complete_path", "trained"])
def test_embedding_policies(policy: str) -> None:
    rows = np.full((2, DEPTH, HEADS), FULL, np.uint8)
    rows[0, 2, 1] = FORWARD_ONLY
    model = tiny_vit()
    executor = attach(model, embeddings=policy)  # type: ignore[arg-type]
    executor.activate(SkipPlan(rows, replicas=1), replica=0)
    trained = []
    for slot in range(2):
        model.zero_grad(set_to_none=True)
        images, labels = random_batch(slot)
        with executor.micro_batch(slot):
            F.cross_entropy(model(images), labels).backward()
        trained.append(model.pos_embed.grad is not None)
        assert model.head.weight.grad is not None
    assert (
        trained == {"frozen": [False, False], "complete_path": [False, True], "trained": [True, True]}[policy]
    )


def averaged(model: nn.Module) -> nn.Module:
    return torch.optim.swa_utils.AveragedModel(model).module


def saved_whole(model: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    assert b"d2ft" not in file.getvalue()
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "torch.save": saved_whole,
    "AveragedModel": averaged,
    "ModelEma": lambda model: timm.utils.ModelEma(model).ema,
    "ModelEmaV2": lambda model: timm.utils.ModelEmaV2(model).module,
    "ModelEmaV3": lambda model: timm.utils.ModelEmaV3(model).module,
    "shallow copies of blocks": lambda model: [copy.copy(block) for block in model.blocks],
}


@pytest.mark.parametrize("way", COPIES)
@pytest.mark.parametrize("compiled", [False, True])
def test_copies_are_plain_dense_models(way: str, compiled: bool) -> None:
    model = tiny_vit()
    executor = attach(model, compile=compiled)
    executor.bind(None, Reduction.EVERY_MICRO_BATCH, check=lambda plan: None)
    executor.activate(SkipPlan(np.zeros((1, DEPTH, HEADS), np.uint8), replicas=1), 0)
    copied = COPIES[way](model)
    dense = tiny_vit()
    images, _ = random_batch(0)
    for ours, plain in zip(getattr(copied, "blocks", copied), dense.blocks, strict=True):
        assert vars(ours).keys() == vars(plain).keys()
        x = torch.randn(2, 5, 48)
        assert torch.equal(ours.train()(x), plain(x))
    if not isinstance(copied, list):
        assert vars(copied).keys() == vars(dense).keys()
        assert torch.equal(copied.train()(images), dense(images))
    with executor.micro_batch(0):  # the model itself still skips every block
        skipped = model.patch_embed(images)
        assert torch.equal(model.blocks(skipped), skipped)


def test_an_attached_model_is_exported() -> None:
    model = tiny_vit().eval()
    attach(model)
    images, _ = random_batch(0)
    exported = torch.export.export(model, (images,)).module()
    torch.testing.assert_close(exported(images), tiny_vit().eval()(images))


def of_meta(model: VisionTransformer, weights: dict[str, torch.Tensor]) -> None:
    model.to_empty(device="cpu")
    model.load_state_dict(weights)


def of_other_parameters(model: VisionTransformer, weights: dict[str, torch.Tensor]) -> None:
    model.load_state_dict({name: value.clone() for name, value in weights.items()}, assign=True)


@pytest.mark.parametrize("load_first", [False, True], ids=["plan after weights", "plan before weights"])
@pytest.mark.parametrize(
    ("device", "fill"),
    [("meta", of_meta), ("meta", of_other_parameters), ("cpu", of_other_parameters)],
    ids=["to_empty", "meta, assign=True", "assign=True"],
)
def test_parameters_may_be_replaced_after_attaching(
    device: str, fill: Callable[..., None], load_first: bool
) -> None:
    rows = special_rows()["random 1"]
    reference = tiny_vit()
    with torch.device(device):
        model = VisionTransformer(
            img_size=16, patch_size=4, embed_dim=48, depth=DEPTH, num_heads=HEADS, num_classes=10
        )
    executor = attach(model)
    executor.bind(None, Reduction.EVERY_MICRO_BATCH)  # through stand-ins of the parameters
    steps = [
        lambda: fill(model, reference.state_dict()),
        lambda: executor.activate(SkipPlan(rows[None], 1), 0),
    ]
    for step in reversed(steps) if load_first else steps:
        step()
    images, labels = random_batch(0)
    with executor.micro_batch(0):
        loss, gradients = loss_and_gradients(model, model, images, labels)
    plain = attach(reference)
    plain.activate(SkipPlan(rows[None], 1), 0)
    with plain.micro_batch(0):
        expected, of_plain = loss_and_gradients(reference, reference, images, labels)
    assert torch.equal(loss, expected)
    for name, gradient in of_plain.items():
        own = gradients[name]
        if gradient is None:
            assert own is None or not own.any()
        else:
            assert torch.equal(own, gradient), name


def test_a_model_by_itself_is_prepared_like_one_of_many_ranks(capsys: pytest.CaptureFixture[str]) -> None:
    reference, model = tiny_vit(), tiny_vit()
    row = special_rows()["random 2"]
    images, labels = random_batch(0)
    found = []
    for each in (reference, model):
        executor = attach(each)
        if each is model:
            d2ft_hpc.prepare(model, executor)
        executor.activate(SkipPlan(row[None], replicas=1), 0)
        with executor.micro_batch(0):
            found.append(loss_and_gradients(each, each, images, labels)[0])
    assert torch.equal(*found)
    assert (
        capsys.readouterr().out == "d2ft: prepared the model by itself, whose gradients no engine reduces\n"
    )


@pytest.mark.parametrize("name", ["AdamW", "SGD"])
def test_what_no_micro_batch_ran_takes_a_step_with_a_zero_gradient(name: str) -> None:
    """As in every engine: moments and weight decay go on, also where the loop is the user's own."""
    rows = np.full((1, DEPTH, HEADS), FULL, np.uint8)
    rows[:, 1] = SHORTCUT
    model, zeros = tiny_vit(), tiny_vit()
    executor = attach(model)
    optimizers = [
        getattr(torch.optim, name)(each.parameters(), lr=0.1, weight_decay=0.1) for each in (model, zeros)
    ]
    optimizers[0].step()  # before any gradient, as to begin a schedule: nothing
    for plan in (None, SkipPlan(rows, replicas=1)):
        if plan is not None:
            executor.activate(plan, 0)
        images, labels = random_batch(0)
        with executor.micro_batch(0):
            F.cross_entropy(model(images), labels).backward()
        for parameter, other in zip(model.parameters(), zeros.parameters(), strict=True):
            given = parameter.grad
            if parameter.requires_grad:
                other.grad = torch.zeros_like(other) if given is None else given.clone()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert all(map(torch.equal, model.parameters(), zeros.parameters()))
    assert not torch.equal(model.blocks[1].mlp.fc1.weight, tiny_vit().blocks[1].mlp.fc1.weight)


def test_a_model_that_is_gone_leaves_nothing_in_optimisers() -> None:
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters())
    gc.collect()
    optimizer.step()
    before = len(optimizer_steps._before)
    attach(tiny_vit())
    gc.collect()
    optimizer.step()
    assert len(optimizer_steps._before) == before


def test_drop_path_and_dropout_run_under_a_plan() -> None:
    model = tiny_vit(drop_path_rate=0.5, proj_drop_rate=0.1, attn_drop_rate=0.1)
    executor = planned(model, special_rows()["random 1"])
    images, labels = random_batch(1)
    losses = []
    for _ in range(2):
        torch.manual_seed(7)
        with executor.micro_batch(0):
            loss, gradients = loss_and_gradients(model, model, images, labels)
        losses.append(loss)
        assert all(torch.isfinite(gradient).all() for gradient in gradients.values() if gradient is not None)
    assert torch.equal(*losses)


def test_misuse_is_refused() -> None:
    model = tiny_vit()
    executor = planned(model, np.zeros((DEPTH, HEADS), np.uint8))
    images, _ = random_batch(1)
    with pytest.raises(PlanError, match="which micro-batch"):
        model(images)
    with pytest.raises(PlanError, match="no row"), executor.micro_batch(1):
        pass
    with pytest.raises(PlanError, match="4 x 3"):
        executor.activate(SkipPlan.dense(1, 1, DEPTH, HEADS + 1), replica=0)
    with pytest.raises(PlanError, match="no replica 1"):
        executor.activate(SkipPlan.dense(1, 1, DEPTH, HEADS), replica=1)
    with pytest.raises(PlanError, match="already"):
        attach(model)
    executor.deactivate()
    assert model(images).requires_grad
