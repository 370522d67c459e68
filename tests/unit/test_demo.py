"""The demo's model and weights, from the source tree and from a wheel."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from safetensors import safe_open
from torch import Tensor, nn

from d2ft_hpc.data.loader import eval_loader
from d2ft_hpc.demo.model import DEMO_WEIGHTS, vit_digits_demo
from tests.splits import open_images

SOURCE = Path(__file__).parents[2]


def test_timm_loads_the_shipped_weights():
    model = timm.create_model("vit_digits_demo", pretrained=True, num_classes=5)
    assert DEMO_WEIGHTS.stat().st_size < 3e6
    with safe_open(DEMO_WEIGHTS, "pt") as file:
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        assert {"made_by", "data", "recipe"} <= file.metadata().keys()
    assert all(w.dtype == torch.float16 for w in weights.values())
    loaded = model.state_dict()
    assert loaded.keys() - weights.keys() == {"head.weight", "head.bias"}
    for name, weight in weights.items():
        assert torch.equal(loaded[name], weight.float())
    assert loaded["head.weight"].shape == (5, 128)


@torch.no_grad()
def features(model: nn.Module, split: str) -> tuple[Tensor, Tensor]:
    images = open_images("digits", image_size=32, split=split, classes=range(5, 10))
    pairs = [(model.eval()(x), y) for x, y in eval_loader(images, batch_size=64, replicas=3)]  # every third
    return torch.cat([f for f, _ in pairs]), torch.cat([y for _, y in pairs])


def nearest_mean_top1(model: nn.Module) -> float:
    """Top-1 on digits 5-9 by the nearest mean of the features of each class: no training at all."""
    known, labels = features(model, "train")
    means = torch.stack([known[labels == k].mean(0) for k in range(5)])
    asked, truth = features(model, "test")
    return (torch.cdist(asked, means).argmin(1) == truth).float().mean().item()


@pytest.mark.full
def test_pretraining_helps_with_digits_it_has_not_seen():
    torch.manual_seed(0)
    scratch = nearest_mean_top1(vit_digits_demo(num_classes=0))
    pretrained = nearest_mean_top1(vit_digits_demo(pretrained=True, num_classes=0))
    assert pretrained > scratch + 0.2, (pretrained, scratch)


@pytest.mark.full
def test_wheel_works_without_the_source_tree(tmp_path):
    tree, site = tmp_path / "tree", tmp_path / "site"
    shutil.copytree(SOURCE / "d2ft_hpc", tree / "d2ft_hpc", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "LICENSE", "README.md"):
        if (SOURCE / name).exists():
            shutil.copy(SOURCE / name, tree)
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--target", str(site), str(tree)], check=True)
    shutil.rmtree(tree)
    code = (
        "import timm, d2ft_hpc.demo.model as m; print(m.__file__);"
        "timm.create_model('vit_digits_demo', pretrained=True, num_classes=3)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(site)},
        check=True,
        capture_output=True,
        text=True,
    )
    assert done.stdout.startswith(str(site))
    assert (site / "d2ft_hpc" / "py.typed").exists()
    assert list(site.glob("d2ft_hpc-*.dist-info/licenses/LICENSE"))
