"""transformers' ViT, DINOv2, DINOv3, CLIP and SigLIP under plans; against their own modules with masks."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import d2ft_hpc
from d2ft_hpc.errors import ConfigError, PlanError, UnsupportedModelError
from d2ft_hpc.execution.attach import attach
from d2ft_hpc.execution.gradients import Reduction
from d2ft_hpc.families.table import backbone_of, family_of
from d2ft_hpc.metering import measure_costs, meter
from d2ft_hpc.model.subnets import ParameterClass, SubnetMap
from tests.masked import assert_close, loss_and_gradients, masked_blocks, planned, random_rows
from tests.models import CLASSES, random_batch
from tests.reference import FULL, SHORTCUT
from tests.subnet_checks import assert_fisher_is_of_own_gradients, assert_heads_own_whole_parameters

transformers = pytest.importorskip("transformers", minversion="5.24")

DEPTH, HEADS = 3, 3
SIZES: dict[str, Any] = {
    "hidden_size": 48,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": HEADS,
    "image_size": 16,
    "patch_size": 4,
}


class Headed(nn.Module):
    """A module of one's own around a model that comes without a head."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.backbone, self.head = model, nn.Linear(48, CLASSES)

    def forward(self, pixel_values: Tensor) -> Tensor:
        logits: Tensor = self.head(self.backbone(pixel_values=pixel_values).pooler_output)
        return logits


def vit(**options: Any) -> nn.Module:
    config = transformers.ViTConfig(**SIZES, intermediate_size=130, num_labels=CLASSES, **options)
    model: nn.Module = transformers.ViTForImageClassification(config)
    return model


def dinov2(**options: Any) -> nn.Module:
    config = transformers.Dinov2Config(**SIZES, num_labels=CLASSES, layerscale_value=0.4, **options)
    model: nn.Module = transformers.Dinov2ForImageClassification(config)
    return model


def dinov2_with_registers(**options: Any) -> nn.Module:
    config = transformers.Dinov2WithRegistersConfig(
        **SIZES, num_labels=CLASSES, use_swiglu_ffn=True, layerscale_value=0.4, **options
    )
    model: nn.Module = transformers.Dinov2WithRegistersForImageClassification(config)
    return model


def dinov3(**options: Any) -> nn.Module:
    config = transformers.DINOv3ViTConfig(
        **SIZES, intermediate_size=96, num_register_tokens=2, layerscale_value=0.4, **options
    )
    return Headed(transformers.DINOv3ViTModel(config))


def dinov3_gated(**options: Any) -> nn.Module:
    return dinov3(use_gated_mlp=True, key_bias=True, pos_embed_rescale=None, **options)


def clip(**options: Any) -> nn.Module:
    return Headed(transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**SIZES, **options)))


def siglip(**options: Any) -> nn.Module:
    text = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    config = transformers.SiglipConfig(
        vision_config={**SIZES, "intermediate_size": 96, **options}, text_config=text, num_labels=CLASSES
    )
    model: nn.Module = transformers.SiglipForImageClassification(config)
    return model


KINDS: dict[str, Callable[..., nn.Module]] = {
    "ViT": vit,
    "DINOv2": dinov2,
    "DINOv2 with registers": dinov2_with_registers,
    "DINOv3": dinov3,
    "DINOv3, gated": dinov3_gated,
    "CLIP": clip,
    "SigLIP": siglip,
}
ROWS = random_rows(DEPTH, HEADS)


def tiny(kind: str, attention: str = "sdpa", **options: Any) -> nn.Module:
    """With parameters away from their initial values, in training mode."""
    torch.manual_seed(0)
    model = KINDS[kind](**options)
    backbone: Any = backbone_of(model)
    backbone.set_attn_implementation(attention)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.train()


def loss_of(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    torch.manual_seed(1)  # of DINOv3's random positions
    output = model(images.to(next(model.parameters()).dtype))
    return F.cross_entropy(getattr(output, "logits", output), labels)


def masked_loss(model: nn.Module, row: np.ndarray, images: Tensor, labels: Tensor) -> Tensor:
    """Of a model without an executor."""
    backbone = backbone_of(model)
    layers = ("attention.o_proj", "self_attn.out_proj", "mlp.fc2", "mlp.down_proj")
    blocks = family_of(backbone).blocks(backbone)
    names = {name for name, _ in blocks[0].named_modules()}
    with masked_blocks(blocks, [name for name in layers if name in names], row):
        return loss_of(model, images, labels)


def assert_as_masked(model: nn.Module, reference: nn.Module, row: np.ndarray, *, only: str = "") -> None:
    """only: of the parameters' names, which are compared."""
    batch = random_batch(1)
    found = loss_and_gradients(model, loss_of(model, *batch))
    expected = loss_and_gradients(reference, masked_loss(reference, row, *batch))
    assert_close(found, expected, lambda name: only in name, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_gradients_equal_the_library_s_modules_with_masks(kind: str, attention: str) -> None:
    for row in ROWS.values() if attention == "sdpa" else [ROWS["random 1"]]:
        reference = tiny(kind, attention).double()
        model = copy.deepcopy(reference)
        planned(model, row)
        assert_as_masked(model, reference, row)


@pytest.mark.parametrize("kind", KINDS)
def test_all_full_is_the_library_s_model_bit_for_bit(kind: str) -> None:
    dense = tiny(kind, "eager")
    model = copy.deepcopy(dense)
    planned(model, np.full((DEPTH, HEADS), FULL, np.uint8))
    batch = random_batch(1)
    loss, gradients = loss_and_gradients(model, loss_of(model, *batch))
    expected_loss, expected = loss_and_gradients(dense, loss_of(dense, *batch))
    assert torch.equal(loss, expected_loss)
    assert all(torch.equal(gradients[name], gradient) for name, gradient in expected.items())
    assert model.state_dict().keys() == dense.state_dict().keys()
    assert all(torch.equal(value, dense.state_dict()[name]) for name, value in model.state_dict().items())
    asked = {"output_hidden_states": True, "output_attentions": True}
    for mode in (True, False):
        outputs = []
        for each in (model, dense):
            torch.manual_seed(1)
            outputs.append(backbone_of(each.train(mode))(batch[0], **asked))
        for name in ("hidden_states", "attentions"):
            found, plain = (output[name] for output in outputs)
            assert len(found) == len(plain) >= DEPTH
            assert all(torch.equal(one, other) for one, other in zip(found, plain, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_of_the_blocks_has_its_heads_or_none(kind: str) -> None:
    model = backbone_of(tiny(kind))
    subnets = SubnetMap.of(model)
    assert subnets.shape == (DEPTH, HEADS)
    assert_heads_own_whole_parameters(model, subnets)
    classes = {name: subnets.classify(name) for name, _ in model.named_parameters()}
    within = f"{subnets.family.blocks_path}.0."
    shared = {
        name.removeprefix(within).split(".", 1)[-1]
        for name, found in classes.items()
        if found is ParameterClass.SHARED and name.startswith(within)
    }
    assert shared - {"weight", "bias", "lambda1"} <= {
        "o_proj.bias",
        "out_proj.bias",
        "fc2.bias",
        "down_proj.bias",
    }
    below = {name.split(".")[0] for name, found in classes.items() if found is ParameterClass.EMBEDDING}
    assert below == ({"embeddings", "pre_layrnorm"} if kind == "CLIP" else {"embeddings"})


@pytest.mark.parametrize("kind", KINDS)
def test_the_names_of_layers_that_users_are_told_for_peft_are_those_cut_by_head(kind: str) -> None:
    model: Any = backbone_of(tiny(kind))
    family = family_of(model)
    layers = family.layers(family.blocks(model)[0]).values()
    own = {name.rpartition(".")[2] for names in layers for name in names}
    model_name = kind.split()[0].rstrip(",").lower()
    page = Path("d2ft_hpc/user_loop/README.md").read_text().lower()
    (told,) = (
        line.split("|")[2]
        for line in page.splitlines()
        if "_proj" in line
        and model_name in (models := line.split("`")[0])
        and ("gated" in models) == ("gate_proj" in own)
    )
    assert set(told.replace("`", "").replace(",", "").split()) == own


@pytest.mark.parametrize("kind", KINDS)
def test_costs_are_those_of_the_library_s_model(kind: str) -> None:
    dense = tiny(kind)
    model = copy.deepcopy(dense)
    backbone = backbone_of(model)
    costs = measure_costs(backbone, attach(model, embeddings="trained"), (3, 16, 16), whole=model)
    image = torch.zeros(1, 3, 16, 16)
    counted = dense.backbone if isinstance(dense, Headed) else dense
    with meter() as metered:
        counted(image)[0].sum().backward()
    assert costs.dense_flops == metered.flops
    assert 0.25 < costs.forward_share < 0.4


@pytest.mark.parametrize("kind", ["ViT", "DINOv2 with registers"])
def test_fisher_information_is_that_of_the_parameters_own_gradients(kind: str) -> None:
    model = tiny(kind)
    subnets = attach(model, embeddings="trained").subnets
    backbone = backbone_of(model)
    assert_fisher_is_of_own_gradients(backbone, subnets, lambda: loss_of(model, *random_batch(2)))


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_of_peft_train_by_head(kind: str) -> None:
    peft = pytest.importorskip("peft")
    row = ROWS["random 1"]
    reference = tiny(kind).double()
    config = peft.LoraConfig(
        r=2, lora_alpha=3, target_modules=r".*\.(q_proj|v_proj|o_proj|out_proj|fc1|fc2|up_proj|down_proj)"
    )
    reference = peft.get_peft_model(reference, config).double()
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            if "lora_B" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model = copy.deepcopy(reference)
    planned(model, row)
    assert_as_masked(model, reference, row, only="lora_")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reduction", [Reduction.AFTER_BACKWARD, Reduction.EVERY_MICRO_BATCH])
def test_blocks_that_checkpoint_themselves_compute_the_same(kind: str, reduction: Reduction) -> None:
    row = ROWS["a block skipped"]
    reference = tiny(kind).double()
    model = copy.deepcopy(reference)
    planned(model, row).bind(lambda: 0, reduction)
    backbone: Any = backbone_of(model)
    backbone.activation_checkpointing_enable()
    family: Any = family_of(backbone)
    assert family.recomputes(backbone)
    assert not family.recomputes_reentrantly(backbone)
    runs: list[int] = []
    norm = family.blocks(backbone)[0].get_submodule(family.norms[0])
    norm.register_forward_hook(lambda *_: runs.append(1))
    assert_as_masked(model, reference, row)
    assert len(runs) == 2  # forward, and again in the backward


def test_reentrant_checkpointing_is_refused() -> None:
    model: Any = tiny("ViT")
    d2ft_hpc.attach(model, planner="random")
    model.activation_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(ConfigError, match=r"reentrant.*activation_checkpointing_enable\(.*False"):
        loss_of(model, *random_batch(1))


def test_dropouts_leave_dense_training_as_it_is_and_draw_under_plans() -> None:
    options = {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.3}
    dense = tiny("ViT", **options)
    model = copy.deepcopy(dense)
    planned(model, np.full((DEPTH, HEADS), FULL, np.uint8))
    batch = random_batch(1)
    assert torch.equal(loss_of(model, *batch), loss_of(dense, *batch))
    attached = tiny("ViT", **options)
    planned(attached, ROWS["random 1"])
    losses = [loss_of(attached, *batch).item() for _ in range(2)]
    assert losses[0] == losses[1]  # of one seed
    torch.manual_seed(2)
    assert F.cross_entropy(attached(batch[0]).logits, batch[1]).item() != losses[0]


@pytest.mark.parametrize("kind", KINDS)
def test_images_grow_in_a_loop_of_one_s_own(kind: str) -> None:
    model = tiny(kind)
    d2ft = d2ft_hpc.attach(model, compute_budget=0.6, total_steps=4)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    tokens, shares = [], []
    backbone: Any = backbone_of(model)
    block = family_of(backbone).blocks(backbone)[0]
    block.register_forward_hook(lambda _, inputs, __: tokens.append(inputs[0].shape[1]))
    prefix = family_of(backbone).tokens(backbone, 0, 0)
    for step in range(4):
        loss_of(model, *random_batch(step)).backward()
        optimizer.step()
        optimizer.zero_grad()
        shares.append(d2ft.measured_share)
    assert tokens[0] == 4 + prefix
    assert tokens[-1] == 16 + prefix
    assert tokens == sorted(tokens)
    model.eval()
    images = random_batch(9)[0]
    plain = tiny(kind).eval()
    plain.load_state_dict(model.state_dict())
    for found, expected in zip(backbone(images).values(), backbone_of(plain)(images).values(), strict=True):
        assert torch.equal(found, expected)


def test_a_loop_by_heads_keeps_what_its_plan_promises() -> None:
    model = tiny("DINOv2")
    d2ft = d2ft_hpc.attach(model, compute_budget=0.6, planner="joint", micro_batches=2)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for step in range(2):
        for slot in range(2):
            images, labels = random_batch(2 * step + slot)
            model(pixel_values=images, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert d2ft.plan is not None
    assert not d2ft.plan.is_dense
    assert d2ft.promised_share == pytest.approx(0.6, abs=0.06)
    assert d2ft.measured_share == pytest.approx(d2ft.promised_share, rel=1e-9)


def test_a_loop_draws_samples_by_the_library_s_logits() -> None:
    model = tiny("ViT")
    d2ft = d2ft_hpc.attach(model, compute_budget=0.7, planner="samples")
    images, labels = d2ft.choose(*random_batch(0, samples=12))
    assert 4 < len(images) == len(labels) < 9
    model(pixel_values=images, labels=labels).loss.backward()
    unbiased = d2ft_hpc.attach(tiny("CLIP"), 0.7, planner="samples", options={"weights": "unbiased"})
    _, weighted = unbiased.choose(*random_batch(0, samples=12))
    assert weighted.shape == (len(labels), CLASSES)


def test_what_was_trained_is_read_by_the_library_alone(tmp_path: Path) -> None:
    model: Any = tiny("ViT")
    planned(model, ROWS["random 1"])
    loss_of(model, *random_batch(1)).backward()
    model.save_pretrained(tmp_path)
    plain = transformers.ViTForImageClassification.from_pretrained(tmp_path)
    assert plain.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in model.state_dict().items())
    images = random_batch(2)[0]
    assert torch.equal(plain.eval()(images).logits, model.eval()(images).logits)
    torch.save(model, tmp_path / "whole.pt")
    whole = torch.load(tmp_path / "whole.pt", weights_only=False)
    assert torch.equal(whole.eval()(images).logits, model(images).logits)


def test_attentions_of_skipped_heads_are_refused() -> None:
    model = tiny("DINOv2", "eager")
    planned(model, np.full((DEPTH, HEADS), SHORTCUT, np.uint8))
    images, _ = random_batch(1)
    states = model(images, output_hidden_states=True).hidden_states
    assert len(states) == DEPTH + 1
    assert all(torch.equal(states[0], state) for state in states)
    with pytest.raises(PlanError, match=r"output_attentions=True.*model\.eval\(\)"):
        model(images, output_attentions=True)
    assert len(model.eval()(images, output_attentions=True).attentions) == DEPTH


def test_positions_that_the_library_cannot_resample_are_refused() -> None:
    config = transformers.ViTConfig(**{**SIZES, "image_size": (16, 24)}, intermediate_size=96)
    with pytest.raises(UnsupportedModelError, match=r"square images alone.*16 x 24 pixels"):
        d2ft_hpc.attach(transformers.ViTModel(config), total_steps=4)
    by_heads = d2ft_hpc.attach(transformers.ViTModel(config), planner="joint")
    assert by_heads.executor.subnets.shape == (DEPTH, HEADS)


def test_what_does_not_fit_is_refused_by_name() -> None:
    model: Any = tiny("ViT")
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(
        UnsupportedModelError, match=r"'flash_attention_2'.*set_attn_implementation\('sdpa'\)"
    ):
        attach(model)
    model = tiny("ViT")
    planned(model, ROWS["random 1"])
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(PlanError, match=r"'flex_attention'.*'sdpa'"):
        model.vit.layers[0](torch.zeros(1, 17, 48))
    with pytest.raises(UnsupportedModelError, match="BeitForImageClassification is none of the supported"):
        attach(transformers.BeitForImageClassification(transformers.BeitConfig(**SIZES)))
    model = tiny("ViT")
    model.vit.layers[1].__class__ = type("Own", (type(model.vit.layers[1]),), {"forward": lambda s, x, *a: x})
    with pytest.raises(
        UnsupportedModelError, match="block 1 is a Own with a forward that is not transformers'"
    ):
        attach(model)


def test_ranks_do_not_get_parts() -> None:
    for config in ({"tensor_parallel": {"autotp_size": 2}}, {"pipeline": {"stages": 2}}):
        model = tiny("ViT")
        given = d2ft_hpc.PipelineModule(model, loss_fn=F.cross_entropy) if "pipeline" in config else model
        with pytest.raises(
            UnsupportedModelError, match=r"run whole.*use neither tensor parallelism nor a pipeline"
        ):
            d2ft_hpc.initialize(model=given, config={**config, "d2ft": {"planner": "joint"}})


def test_a_tower_inside_a_larger_model_follows_plans() -> None:
    text = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    config = transformers.CLIPConfig(
        text_config={**text, "vocab_size": 50}, vision_config=SIZES, projection_dim=8
    )
    model = transformers.CLIPModel(config).train()
    executor = planned(model, ROWS["a block skipped"])
    ids = torch.arange(12).view(2, 6)
    model(input_ids=ids, pixel_values=random_batch(1, samples=2)[0], return_loss=True).loss.backward()
    blocks = executor.subnets.blocks(backbone_of(model))
    assert [any(p.grad is not None for p in block.parameters()) for block in blocks] == [True, False, True]
    assert all(p.grad is not None for p in model.text_model.encoder.parameters())
