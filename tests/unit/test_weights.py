"""Where weights come from: files, folders and the hub's cache without a network."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from d2ft_hpc.config import load_config
from d2ft_hpc.demo.model import DEMO_WEIGHTS
from d2ft_hpc.errors import CheckpointError, ConfigError
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
    same_classes = build_model(NAME, num_classes=7, weights=str(tiny), options={"img_size": 96})
    assert torch.equal(same_classes.head.weight, stored["head.weight"].float())
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


def test_faults(tiny: Path, tmp_path: Path) -> None:
    def refused(words: str, weights: Path) -> None:
        with pytest.raises(CheckpointError, match=words):
            build_model(NAME, num_classes=3, weights=str(weights))

    refused("no such file", tmp_path / "absent.safetensors")
    refused("has no safetensors file", tmp_path)
    (tmp_path / "a.safetensors").write_bytes(b"x" * 100)
    refused("not a readable safetensors file", tmp_path)
    save_file({"x": torch.zeros(1)}, tmp_path / "b.safetensors")
    refused(r"has a.safetensors, b.safetensors", tmp_path)
    refused(r"lacks \d+ of vit_tiny", tmp_path / "b.safetensors")
    refused("cannot be loaded into|lacks", DEMO_WEIGHTS)
    (tmp_path / "folder").mkdir()
    save_file(load_file(tiny / "model.safetensors"), tmp_path / "folder" / "one.safetensors")
    (tmp_path / "folder" / "config.json").write_text('{"mean": "grey"}')
    refused("not a readable description", tmp_path / "folder")
    for name, words in (
        ("vit_tinny_patch16_224", "did you mean vit_tiny"),
        ("vit_tiny_patch16_224.magic", "augreg_in21k"),
    ):
        with pytest.raises(ConfigError, match=words):
            build_model(name, num_classes=3)


def test_images_of_another_size_than_the_models_are_told_before_training() -> None:
    config = load_config(Path(__file__).parents[2] / "configs" / "demo.yaml", ["data.image_size=40"])
    with pytest.raises(
        ConfigError, match=r"data\.image_size=40: .* set model\.options\.img_size=40, or data\.image"
    ):
        set_up(config, SoloControl(), torch.device("cpu"))
