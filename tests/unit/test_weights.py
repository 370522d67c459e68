"""Where weights come from: files, folders and the hub's cache without a network."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from d2ft_hpc.config import read_config
from d2ft_hpc.demo.model import DEMO_WEIGHTS
from d2ft_hpc.errors import CheckpointError, ConfigError, UnsupportedModelError
from d2ft_hpc.launch.control import SoloControl
from d2ft_hpc.model.build import build_model, pixel_statistics
from d2ft_hpc.training.job import set_up

NAME = "vit_tiny_patch16_224.augreg_in21k"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a ViT-Ti/16 at 96 px with 7 classes, as timm describes one for the hub."""
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=96, num_classes=7)
    with torch.no_grad():
        model.pos_embed.copy_(torch.linspace(0, 1, model.pos_embed.numel()).view_as(model.pos_embed))
    save_file(
        {name: weight.half() for name, weight in model.state_dict().items()}, folder / "model.safetensors"
    )
    described = {"mean": [0.1, 0.2, 0.3], "std": [0.5, 0.6, 0.7], "num_classes": 7}
    (folder / "config.json").write_text(json.dumps({"architecture": NAME, "pretrained_cfg": described}))
    return folder


def test_files_and_folders(tiny: Path) -> None:
    stored = load_file(tiny / "model.safetensors")
    for weights in (tiny, tiny / "model.safetensors"):
        model = build_model(NAME, num_classes=10, weights=str(weights), options={"img_size": 96})
        loaded = model.state_dict()
        assert loaded["head.weight"].shape == (10, 192)
        for name, weight in stored.items():
            assert name.startswith("head.") or torch.equal(loaded[name], weight.float()), name
        # Nearly zero, so that the first steps do not shake what was pretrained; not zero, which would score nothing.
        assert loaded["head.weight"].std().item() == pytest.approx(1e-3)
        assert not loaded["head.bias"].any()
    same_classes = build_model(NAME, num_classes=7, weights=str(tiny), options={"img_size": 96})
    assert torch.equal(same_classes.head.weight, stored["head.weight"].float())
    new = build_model(NAME, num_classes=10, options={"img_size": 96})
    assert new.head.weight.std().item() == pytest.approx(0.02, rel=0.1)  # all of it is new: as timm makes it
    assert pixel_statistics(NAME, str(tiny)) == ((0.1, 0.2, 0.3), (0.5, 0.6, 0.7))
    assert pixel_statistics(NAME, str(tiny / "model.safetensors")) == ((0.5,) * 3, (0.5,) * 3)
    assert pixel_statistics("vit_small_patch14_dinov2", None)[0] == (0.485, 0.456, 0.406)


def test_positions_and_patches_are_resampled_as_timm_does(tiny: Path) -> None:
    """Against timm's own loading of the same file, at another image size and another patch size."""
    for options in ({"img_size": 160}, {"img_size": 96, "patch_size": 8}):
        model = build_model(NAME, num_classes=3, weights=str(tiny), options=options)
        theirs = timm.create_model(
            NAME,
            pretrained=True,
            num_classes=3,
            pretrained_cfg_overlay={
                "file": str(tiny / "model.safetensors"),
                "num_classes": 7,
                "custom_load": False,
            },
            **options,
        )
        assert torch.equal(model.pos_embed, theirs.pos_embed)
        assert torch.equal(model.patch_embed.proj.weight, theirs.patch_embed.proj.weight)
    at_96 = build_model(NAME, num_classes=3, weights=str(tiny), options={"img_size": 96}).pos_embed
    at_160 = build_model(NAME, num_classes=3, weights=str(tiny), options={"img_size": 160}).pos_embed
    assert at_160.shape == (1, 101, 192)
    torch.testing.assert_close(at_160.mean(), at_96.mean(), rtol=0.05, atol=0)


def test_the_hubs_cache_without_a_network(tiny: Path, tmp_path: Path) -> None:
    """A cache as huggingface_hub lays it out; a process of its own, because the hub reads its settings at import."""
    repository = tmp_path / "hub" / "models--timm--vit_tiny_patch16_224.augreg_in21k"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    torch.manual_seed(1)
    weights = timm.create_model("vit_tiny_patch16_224", num_classes=21843).state_dict()
    save_file(weights, snapshot / "model.safetensors")
    code = (
        "import sys; from d2ft_hpc.model.build import build_model\n"
        "for which in sys.argv[1:]:\n"
        f"    m = build_model({NAME!r}, num_classes=4, weights=which, options={{'img_size': 64}})\n"
        "    print('SUM', m.blocks[3].attn.qkv.weight.double().sum().item())"
    )
    present = ["pretrained", "hf-hub:timm/vit_tiny_patch16_224.augreg_in21k"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    command = [sys.executable, "-c", code, *present, "hf-hub:nobody/nothing"]
    found = subprocess.run(command, env=environment, capture_output=True, text=True)
    expected = weights["blocks.3.attn.qkv.weight"].double().sum().item()
    assert found.stdout.splitlines().count(f"SUM {expected}") == 2, found.stderr
    assert found.returncode == 1
    assert "CheckpointError: model.weights=hf-hub:nobody/nothing" in found.stderr
    assert "HF_HUB_OFFLINE=1" in found.stderr


@pytest.mark.parametrize(
    ("name", "told"),
    [
        (
            "deit_tiny_distilled_patch16_224",
            "second classifier for distillation, .*: take the model without it",
        ),
        (
            "vit_pwee_patch16_reg1_gap_256",
            "ParallelScalingBlock, which has one matrix into attention and MLP",
        ),
        ("resnet18", "ResNet is none of the supported models"),
    ],
)
def test_models_that_are_not_supported_are_refused_before_their_weights_are_looked_for(
    name: str, told: str
) -> None:
    with pytest.raises(UnsupportedModelError, match=rf"model\.name='{name}'.*{told}"):
        build_model(name, num_classes=3, weights="hf-hub:nobody/nothing")


@pytest.mark.parametrize("name", ["resnet18", "swin_tiny_patch4_window7_224"])
def test_options_of_models_that_are_not_supported_are_not_spoken_of(name: str) -> None:
    told = rf"^model\.name='{name}': timm\.models\.\w+\.\w+ is none of the supported models; d2ft-hpc models .{{,60}}$"
    with pytest.raises(UnsupportedModelError, match=told):
        build_model(name, num_classes=3, options={"img_size": 64, "dynamic_img_size": True})


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"in_chans": 1}, r"model\.options\.in_chans=1: images have 3 channels"),
        ({"num_classes": 5}, r"model\.options\.num_classes=5: .*remove it"),
        ({"checkpoint_path": "x.pth"}, r"model\.options\.checkpoint_path='x\.pth': model\.weights says"),
        ({"drop_path_rate": 2}, r"model\.options\.drop_path_rate=2: a share"),
        ({"img_sise": 64}, r"model\.options\.img_sise=64: .*; did you mean model\.options\.img_size\?"),
        ({"img_size": 0}, r"model\.options=\{'img_size': 0\}: .*correct or remove them"),
        ({"img_size": "large"}, r"model\.options=\{'img_size': 'large'\}"),
        ({"patch_size": -3}, r"model\.options=\{'patch_size': -3\}"),
        ({"num_heads": 5}, r"divisible by num_heads; correct"),
        ({"drop_rate": 5}, r"dropout probability has to be between 0 and 1"),
        ({"global_pool": ""}, r"gives \(2, 197, 3\) for 2 images"),
        ({"class_token": False}, r"model\.options=\{'class_token': False\}"),
        ({"norm_layer": 5}, r"model\.options=\{'norm_layer': 5\}"),
    ],
)
def test_options_that_make_no_such_model_are_told(options: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told) as caught:
        build_model(NAME, num_classes=3, weights="absent.safetensors", options=options)
    assert len(str(caught.value).splitlines()) == 1


def test_looking_at_a_model_first_does_not_change_its_random_weights() -> None:
    torch.manual_seed(5)
    model = build_model(NAME, num_classes=3, options={"img_size": 32})
    torch.manual_seed(5)
    theirs = timm.create_model(NAME, num_classes=3, img_size=32)
    for name, weight in theirs.state_dict().items():
        assert torch.equal(weight, model.state_dict()[name]), name


def test_faults(tiny: Path, tmp_path: Path) -> None:
    def refused(words: str, weights: Path) -> None:
        with pytest.raises(CheckpointError, match=words):
            build_model(NAME, num_classes=3, weights=str(weights))

    refused("no such file; write pretrained, hf-hub:OWNER/NAME, .*null for", tmp_path / "absent.safetensors")
    refused("model.weights=pretrainded: no such file; did you mean pretrained", Path("pretrainded"))
    refused("has no safetensors file", tmp_path)
    (tmp_path / "a.safetensors").write_bytes(b"x" * 100)
    refused("not a readable safetensors file", tmp_path)
    torch.save({"x": torch.zeros(1)}, tmp_path / "a.pth")
    refused(r"a\.pth: not a readable safetensors file: .*; save the state dict by safe", tmp_path / "a.pth")
    save_file({"x": torch.zeros(1)}, tmp_path / "b.safetensors")
    refused(r"has a.safetensors, b.safetensors", tmp_path)
    refused(r"lacks \d+ of vit_tiny", tmp_path / "b.safetensors")
    refused(
        r"cannot be loaded into vit_tiny\S*: .*size mismatch for .*; correct model\.options", DEMO_WEIGHTS
    )
    (tmp_path / "folder").mkdir()
    save_file(load_file(tiny / "model.safetensors"), tmp_path / "folder" / "one.safetensors")
    (tmp_path / "folder" / "config.json").write_text('{"mean": "grey"}')
    refused("not a readable description", tmp_path / "folder")
    for name, words in (
        ("vit_tinny_patch16_224", "did you mean vit_tiny"),
        ("vit_base", r"did you mean vit_base_\w+\?"),  # not gcvit_base, which cannot train under plans
        ("google/vit-large", "d2ft-hpc models lists"),
        ("vit_tiny_patch16_224.magic", "augreg_in21k"),
    ):
        with pytest.raises(ConfigError, match=words):
            build_model(name, num_classes=3)


@pytest.mark.parametrize(
    ("size", "told"),
    [
        (40, "set data.image_size=32, or both data.image_size and model.options.img_size to 40"),
        (30, "in patches of 4 x 4, and 30 holds no whole number of them; set data.image_size=32"),
        (
            41,
            "and 41 holds no whole number of them; set data.image_size=32, or both data.image_size and "
            "model.options.img_size to 40",
        ),
    ],
)
def test_images_of_another_size_than_the_models_are_told_before_training(size: int, told: str) -> None:
    config = read_config(Path(__file__).parents[2] / "configs" / "demo.yaml", [f"data.image_size={size}"])
    with pytest.raises(ConfigError, match=rf"data\.image_size={size}: .*{re.escape(told)}$"):
        set_up(config, SoloControl(), torch.device("cpu"))
