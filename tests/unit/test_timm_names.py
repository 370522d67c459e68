"""Every model of timm's that is called supported, with its own settings in two narrow blocks, under plans."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

from d2ft_hpc.execution.executor import attach
from d2ft_hpc.families.table import backbone_of, family_of
from d2ft_hpc.planning.plan import SkipPlan
from tests.masked import loss_and_gradients, masked_blocks
from tests.reference import FORWARD_ONLY, FULL, SHORTCUT

HEADS, WIDTH = 3, 48
ROWS = np.array(
    [[[FULL, SHORTCUT, FORWARD_ONLY], [FORWARD_ONLY, FULL, FULL]], [[FULL] * 3, [FORWARD_ONLY, SHORTCUT, FORWARD_ONLY]]],
    np.uint8,
)


def narrow(name: str) -> nn.Module:
    """The model of this name with two blocks of 3 heads and width 48, for images of 4 x 4 patches."""
    sizes: dict[str, Any] = {"embed_dim": WIDTH, "num_heads": HEADS, "depth": 2}
    if name.startswith("vitamin"):
        from timm.models.vitamin import VitCfg

        sizes["embed_cfg"] = VitCfg(embed_dim=(16, 32, WIDTH), depths=(1, 1), stem_width=16)
    elif name == "vit_base_mci_224":
        del sizes["embed_dim"]  # that of its stem
    elif "_r" not in name and "_resnet" not in name:
        sizes["patch_size"] = 4
    if "sapiens2" in name:
        sizes["num_kv_heads"] = HEADS
    if not name.endswith("_enc"):
        sizes["num_classes"] = 10
    torch.manual_seed(0)
    with torch.device("meta"):
        draft = backbone_of(timm.create_model(name, **sizes))
    high, wide = family_of(draft).patch_size(draft)
    model = timm.create_model(name, **sizes, img_size=(4 * high, 4 * wide))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # of positions' small networks
    return model


def settings(model: nn.Module) -> str:
    """All that tells a narrow model from another but its weights."""
    plain = (bool, int, float, str, tuple, type(None))
    own = [
        (name, key, value)
        for name, module in model.named_modules()
        for key, value in sorted(vars(module).items())
        if isinstance(value, plain) and "drop" not in key
    ]
    shapes = [(name, tuple(parameter.shape)) for name, parameter in model.named_parameters()]
    return re.sub(r"drop_prob=\S+", "", f"{model}{own}{shapes}")


def images_for(model: nn.Module, dtype: torch.dtype) -> Tensor:
    backbone = backbone_of(model)
    high, wide = family_of(backbone).patch_size(backbone)
    return torch.randn(2, 3, 4 * high, 4 * wide, generator=torch.Generator().manual_seed(1)).to(dtype)


def loss_of(output: Tensor) -> Tensor:
    return (output * torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view(output.shape)).sum()


def check_all_full(model: nn.Module) -> None:
    dense = copy.deepcopy(model)
    executor = attach(model, embeddings="trained")
    executor.activate(SkipPlan(np.full((1, 2, HEADS), FULL, np.uint8), replicas=1), replica=0)
    images = images_for(model, torch.float32)
    with executor.micro_batch(0):
        loss, gradients = loss_and_gradients(model, loss_of(model(images)))
    expected_loss, expected = loss_and_gradients(dense, loss_of(dense(images)))
    assert torch.equal(loss, expected_loss)
    assert all(torch.equal(gradients[name], gradient) for name, gradient in expected.items())
    state, expected_state = model.state_dict(), dense.state_dict()
    assert state.keys() == expected_state.keys()
    assert all(torch.equal(value, state[name]) for name, value in expected_state.items())
    assert torch.equal(model.eval()(images), dense.eval()(images))


def check_gradients(reference: nn.Module) -> None:
    model = copy.deepcopy(reference)
    executor = attach(model, embeddings="trained")
    executor.activate(SkipPlan(ROWS, replicas=1), replica=0)
    images = images_for(model, torch.float64)
    blocks = family_of(backbone_of(reference)).blocks(backbone_of(reference))
    inner = dict(blocks[0].named_modules())
    outs = [name for name in ("attn.proj", "mlp.fc2", "mlp.w2") if name in inner]
    across = [
        name
        for name, out in (("attn.norm", "attn.proj"), ("mlp.norm", "mlp.fc2"))
        if isinstance(inner.get(name), nn.LayerNorm) and out in inner
    ]
    for slot, row in enumerate(ROWS):
        with executor.micro_batch(slot):
            loss, gradients = loss_and_gradients(model, loss_of(model(images)))
        with masked_blocks(blocks, outs, row, across):
            expected_loss, expected = loss_and_gradients(reference, loss_of(reference(images)))
        torch.testing.assert_close(loss, expected_loss, rtol=1e-10, atol=1e-10)
        for name, gradient in expected.items():
            torch.testing.assert_close(
                gradients[name], gradient, rtol=1e-7, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}"
            )


if __name__ == "__main__":
    import json, time

    names = [n for n, v in json.load(open("/tmp/timmfam/census.json")).items() if v[2] == "ok"]
    seen = {}
    bad = {}
    t = time.time()
    for n in names:
        try:
            m = narrow(n)
        except Exception as e:
            bad[n] = "NARROW " + repr(e)[:200]
            continue
        key = settings(m)
        if key in seen:
            seen[key].append(n)
            continue
        seen[key] = [n]
        try:
            check_all_full(copy.deepcopy(m))
            check_gradients(m.double())
        except Exception as e:
            bad[n] = repr(e)[:400]
    print(time.time() - t, len(names), len(seen))
    json.dump(seen, open("/tmp/timmfam/groups.json", "w"))
    for n, e in bad.items():
        print(n, e)
