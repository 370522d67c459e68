"""What is refused before the first step, the section of DeepSpeed's JSON, portable states, undocumented names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm.layers
import torch
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

import d2ft_hpc
from d2ft_hpc.engines.check import check_plan, check_recompute
from d2ft_hpc.engines.portable import PortableState, collect_plain, restore_plain, write_file
from d2ft_hpc.engines.zero import ZeroRules
from d2ft_hpc.errors import CheckpointError, ConfigError, PlanError, UnsupportedModelError
from d2ft_hpc.planning import SkipPlan
from d2ft_hpc.user_loop.section import split
from tests.models import DEPTH, HEADS, random_batch, tiny, tiny_vit

loss_function = torch.nn.functional.cross_entropy
CONFIGS = Path(__file__).parents[2] / "configs" / "deepspeed"


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"slots": 3}, "rows for 2 micro-batches a replica, the engine accumulates 3"),
        ({"replicas": 4}, "for 2 replicas, the engine has 4"),
        ({"same_rows": "the pipes cross"}, "rows differ in micro-batch 1, but the pipes cross"),
    ],
)
def test_plans_that_do_not_fit_the_engine_are_refused(asked: dict[str, Any], told: str) -> None:
    operations = np.full((4, DEPTH, HEADS), 2, np.uint8)
    operations[3, 0, 0] = 0
    plan = SkipPlan(operations, replicas=2)
    check_plan(plan, slots=2, replicas=2, same_rows=None)
    with pytest.raises(PlanError, match=told):
        check_plan(plan, **{"slots": 2, "replicas": 2, "same_rows": None, **asked})


@pytest.mark.parametrize(
    ("config", "right", "wrong", "told"),
    [
        (
            {"zero_optimization": {"stage": 1, "contiguous_gradients": False}},
            ["0.19.8"],
            ["0.17.6"],
            r"contiguous_gradients=false: .* trains wrongly",
        ),
        (
            {"bf16": {"enabled": True}},
            ["0.16.4", "0.17.5", "0.18.6", "0.19.8"],
            ["0.17.6", "0.18.5"],
            r"stage=0 with bf16: .* never clears gradients .* Use stage 1",
        ),
        (
            {"zero_optimization": {"stage": 2}, "gradient_accumulation_steps": 2},
            ["0.16.4", "0.17.5", "0.18.3", "0.19.8"],
            ["0.17.6", "0.18.2"],
            r"stage=2 with accumulated gradients: .* only the last micro-batch's, .* Use stage 1 or 3",
        ),
        (
            {"zero_optimization": {"stage": 2}, "train_batch_size": 64, "train_micro_batch_size_per_gpu": 8},
            ["0.17.5", "0.18.3"],
            ["0.17.6", "0.18.2"],
            r"stage=2 with accumulated gradients",
        ),
        (
            {"zero_optimization": {"stage": 2}, "train_micro_batch_size_per_gpu": 8},
            ["0.17.6", "0.18.2"],
            [],
            "",
        ),
        (
            {
                "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
                "gradient_accumulation_steps": 2,
            },
            ["0.17.6", "0.18.2"],
            [],
            "",
        ),
    ],
)
def test_a_setting_with_which_old_deepspeed_trains_wrongly_is_refused(
    config: dict[str, Any], right: list[str], wrong: list[str], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for release in right:
        monkeypatch.setattr("d2ft_hpc.engines.zero.version", lambda _, release=release: release)
        ZeroRules.of(config)
    for release in wrong:
        monkeypatch.setattr("d2ft_hpc.engines.zero.version", lambda _, release=release: release)
        with pytest.raises(ConfigError, match=told):
            ZeroRules.of(config)


def test_reentrant_recomputation_is_refused() -> None:
    model = tiny_vit()
    model.set_grad_checkpointing()
    check_recompute(model)
    timm.layers.set_reentrant_ckpt(True)
    try:
        with pytest.raises(ConfigError, match="set_reentrant_ckpt"):
            check_recompute(model)
    finally:
        timm.layers.set_reentrant_ckpt(False)


@pytest.mark.parametrize(
    ("section", "told"),
    [
        ({"compute_bugdet": 0.5}, r"d2ft\.compute_bugdet: unknown key.*did you mean d2ft\.compute_budget\?"),
        ({"size": 8}, r"d2ft\.size: unknown key.*did you mean d2ft\.options\.image_size\?"),
        ({"compute_budget": 2.0}, r"d2ft\.compute_budget=2\.0"),
        ({"replan": {"every": "2 epochs"}}, "count steps"),
        ({"forward_score": "gradient_norm"}, r"d2ft\.forward_score"),
    ],
)
def test_a_bad_section_is_told(section: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        split({"d2ft": section})


PIPELINE = {"pipeline": {"stages": 2}}
TENSOR = {"tensor_parallel": {"autotp_size": 2}}


@pytest.mark.parametrize(
    ("stages", "config", "told"),
    [
        (None, PIPELINE, r"pipeline\.stages=2: .*PipelineModule\(model, loss_fn=\.\.\.\)"),
        (0, {}, "give num_stages"),
        (0, {**PIPELINE, "zero_optimization": {"stage": 2}}, "DeepSpeed refuses; use stage 0 or 1"),
        (2, {"fp16": {"enabled": True}, "zero_optimization": {"stage": 1}}, "use bf16"),
        (None, {**TENSOR, "fp16": {"enabled": True}, "zero_optimization": {"stage": 1}}, "use bf16"),
        (None, {"fp16": {"enabled": True}}, "Use stage 1, or bf16"),
        (None, {"tensor_parallel": {"autotp_size": 2, "preset_model": "llama"}}, "keep autotp_size alone"),
        (None, {"zero_optimization": {"stage": 2, "zenflow": {"topk_ratio": 0.1}}}, "never tried"),
        (
            None,
            {
                "zero_optimization": {
                    "stage": 3,
                    "offload_optimizer": {"device": "cpu", "super_offload": True},
                }
            },
            r"^zero_optimization\.offload_optimizer\.super_offload=True .* never tried .*: remove it$",
        ),
        (
            None,
            {"data_efficiency": {"enabled": True, "data_routing": {"random_ltd": {"enabled": True}}}},
            r"^data_efficiency\.data_routing\.random_ltd\.enabled=True .* never tried .*: remove it$",
        ),
        (
            None,
            {"managed_gradient_accumulation": False, "gradient_accumulation_steps": 2},
            r"^managed_gradient_accumulation=false: .*: remove it, and call step\(\) after each of ",
        ),
    ],
)
def test_what_initialize_cannot_run_is_refused_before_ranks_meet(
    stages: int | None, config: dict[str, Any], told: str
) -> None:
    """stages: None: no pipeline; 0: one whose stages the configuration must give."""
    model = tiny_vit()
    given = model if stages is None else d2ft_hpc.PipelineModule(model, loss_function, stages or None)
    with pytest.raises(ConfigError, match=told):
        d2ft_hpc.initialize(model=given, config=config)
    assert not hasattr(model.blocks[0], "_d2ft")


def test_an_optimizer_of_the_whole_model_cannot_train_a_part() -> None:
    model = tiny_vit()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ConfigError, match="give a function of the parameters"):
        d2ft_hpc.initialize(model=model, optimizer=optimizer, config=TENSOR)


def test_parts_of_a_model_with_a_forward_of_its_own_are_refused() -> None:
    class Derived(VisionTransformer):
        def forward_features(self, x: Tensor, **masks: Any) -> Tensor:
            return super().forward_features(x, **masks)

    model = tiny(Derived, 0.05)
    with pytest.raises(UnsupportedModelError, match="Derived has a forward of its own"):
        d2ft_hpc.initialize(model=model, config=TENSOR)
    with pytest.raises(UnsupportedModelError, match="Derived has a forward of its own"):
        d2ft_hpc.initialize(model=d2ft_hpc.PipelineModule(model, loss_function, 2), config={})


def test_a_configuration_file_that_is_none_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.json.*cannot be read"):
        split(str(tmp_path / "absent.json"))
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(ConfigError, match="is no JSON"):
        split(str(tmp_path / "broken.json"))


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.json")), ids=lambda path: path.stem)
def test_the_shipped_deepspeed_configurations_can_run_plans(path: Path) -> None:
    settings, section = split(str(path))
    assert ZeroRules.of(settings).stage == int(path.stem[len("zero")])
    assert "d2ft" not in settings
    assert section.compute_budget == json.loads(path.read_text())["d2ft"]["compute_budget"]


def test_a_portable_state_comes_back_bitwise_and_names_what_does_not_fit(tmp_path: Path) -> None:
    model, other = tiny_vit(), tiny_vit(seed=1)
    optimizers = [torch.optim.AdamW(each.parameters(), lr=1e-3) for each in (model, other)]
    images, labels = random_batch(0)
    for _ in range(2):
        torch.nn.functional.cross_entropy(model(images), labels).backward()
        optimizers[0].step()
        optimizers[0].zero_grad()
    collect_plain(model, optimizers[0]).write(tmp_path, write_file)
    restore_plain(PortableState.read(tmp_path), other, optimizers[1])
    for each, optimizer in zip((model, other), optimizers, strict=True):
        torch.nn.functional.cross_entropy(each(images), labels).backward()
        optimizer.step()
    assert all(bool((a == b).all()) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    tiny_vit().load_state_dict(load_file(tmp_path / "model.safetensors"), strict=True)
    state = PortableState.read(tmp_path)
    del state.weights["head.bias"]
    with pytest.raises(CheckpointError, match=r"of another model.*head\.bias"):
        state.check_fits({name: tensor.shape for name, tensor in model.state_dict().items()})
    (tmp_path / "optimizer.safetensors").write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match="no readable training state"):
        PortableState.read(tmp_path)
