"""Settings for DeepSpeed: what it would pass over is refused with the nearest key, and what it reads is accepted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from deepspeed.runtime.config import DeepSpeedConfig

import d2ft_hpc
from d2ft_hpc.config import read_config
from d2ft_hpc.engines.deepspeed_settings import check_settings
from d2ft_hpc.errors import ConfigError
from d2ft_hpc.user_loop.section import require_length, split
from tests.models import tiny_vit

REPOSITORY = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (
            {"zero_optimisation": {"stage": 2}},
            r"zero_optimisation: unknown key.*did you mean zero_optimization\?",
        ),
        ({"steps_per_prnt": 1}, r"steps_per_prnt.*did you mean steps_per_print\?"),
        ({"stage": 2}, r"^stage: unknown key of DeepSpeed"),
        (
            {"zero_optimization": {"stag": 2}},
            r"zero_optimization\.stag: .*did you mean zero_optimization\.stage\?",
        ),
        (
            {"zero_optimization": {"offload_optimizer": {"devise": "cpu"}}},
            r"zero_optimization\.offload_optimizer\.devise: .*offload_optimizer\.device\?",
        ),
        ({"zero_optimization": {"overlap_comm": "maybe"}}, r"zero_optimization\.overlap_comm='maybe': input"),
        ({"zero_optimization": None}, r"zero_optimization=None: DeepSpeed .* does not take it"),
        ({"fp16": {"enbled": True}}, r"fp16\.enbled: .*did you mean fp16\.enabled\?"),
        ({"optimizer": {"typ": "Adam"}}, r"optimizer\.typ: .*did you mean optimizer\.type\?"),
        ({"optimizer": 5}, r"optimizer=5: DeepSpeed .* does not take it"),
        (
            {"scheduler": {"type": "WarmupLR", "parms": {}}},
            r"scheduler\.parms: .*did you mean scheduler\.params\?",
        ),
        (
            {"activation_checkpointing": {"partition_activation": True}},
            r"did you mean .*\.partition_activations\?",
        ),
        ({"pipeline": {"stags": 2}}, r"pipeline\.stags: .*did you mean pipeline\.stages\?"),
        ({"pipeline": {"foo": 2}}, r"pipeline\.foo: unknown key .*remove it"),
        ({"tensor_parallel": {"autotp_sise": 2}}, r"did you mean tensor_parallel\.autotp_size\?"),
        ({"csv_monitor": {"output_pat": "x"}}, r"csv_monitor\.output_pat: .*csv_monitor\.output_path\?"),
        ({"aio": {"block_siz": 1}}, r"did you mean aio\.block_size\?"),
        ({"checkpoint": {"tag_validation": "foo"}}, r"checkpoint=\{'tag_validation': 'foo'\}: DeepSpeed"),
        ({"gradient_clipping": "a"}, r"gradient_clipping='a': a number is needed"),
        ({"train_batch_size": "auto"}, r"train_batch_size='auto': a whole number"),
        ({"train_micro_batch_size_per_gpu": 0}, r"train_micro_batch_size_per_gpu=0: a whole number"),
    ],
)
def test_what_deepspeed_would_pass_over_is_refused(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        check_settings(settings)
    if "zero_optimization" not in settings or settings["zero_optimization"] is not None:
        with pytest.raises(ConfigError):
            d2ft_hpc.initialize(model=tiny_vit(), config=settings)


ACCEPTED: list[dict[str, Any]] = [
    {},
    {"train_batch_size": 32, "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 8},
    {
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": 1e-3, "betas": [0.9, 0.99], "eps": 1e-8, "weight_decay": 0.01},
        }
    },
    {"scheduler": {"type": "WarmupLR", "params": {"warmup_min_lr": 0, "warmup_num_steps": 10}}},
    {
        "fp16": {
            "enabled": True,
            "loss_scale": 0,
            "initial_scale_power": 8,
            "hysteresis": 2,
            "min_loss_scale": 1,
        }
    },
    {"bf16": {"enabled": True}, "gradient_clipping": 1, "prescale_gradients": False, "steps_per_print": None},
    {
        "zero_optimization": {
            "stage": 3,
            "overlap_comm": True,
            "reduce_bucket_size": 5e8,
            "offload_param": {"device": "cpu", "pin_memory": False},
            "offload_optimizer": {"device": "cpu", "buffer_count": 4},
            "stage3_prefetch_bucket_size": 1e7,
            "stage3_param_persistence_threshold": 1e5,
        }
    },
    {"zero_optimization": {"stage": 2, "cpu_offload": True}},
    {
        "activation_checkpointing": {
            "partition_activations": True,
            "cpu_checkpointing": False,
            "profile": True,
        }
    },
    {"pipeline": {"stages": "auto", "partition": "best", "use_reentrant": False, "pipe_partitioned": False}},
    {"tensor_parallel": {"autotp_size": 2}, "sequence_parallel_size": 1, "data_parallel_size": 1},
    {"tensorboard": {"enabled": False, "output_path": "x"}, "wandb": {"enabled": False, "project": "x"}},
    {
        "csv_monitor": {"enabled": False},
        "comms_logger": {"enabled": False},
        "flops_profiler": {"enabled": False},
    },
    {"aio": {"block_size": 1048576, "queue_depth": 8}, "autotuning": {"enabled": False}},
    {"checkpoint": {"tag_validation": "Warn", "load_universal": False, "use_node_local_storage": False}},
    {
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "wall_clock_breakdown": True,
    },
    {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False, "dump_state": False},
    {"dataloader_drop_last": True, "memory_breakdown": False},
    {"gradient_predivide_factor": 1.0, "disable_allgather": False, "hybrid_engine": {"enabled": False}},
]


@pytest.mark.parametrize("settings", ACCEPTED, ids=lambda settings: ",".join(settings) or "nothing")
def test_what_deepspeed_reads_is_accepted(settings: dict[str, Any]) -> None:
    before = json.dumps(settings)
    check_settings(settings)
    assert json.dumps(settings) == before
    DeepSpeedConfig({"train_micro_batch_size_per_gpu": 1, **settings})


@pytest.mark.parametrize(
    "path", sorted((REPOSITORY / "configs" / "deepspeed").glob("*.json")), ids=lambda path: path.stem
)
def test_the_shipped_files_are_accepted(path: Path) -> None:
    check_settings(split(path)[0])


def test_train_names_the_key_in_the_runs_configuration() -> None:
    """One that stands in DeepSpeed's sources, but belongs in another section."""
    config = read_config(REPOSITORY / "configs" / "demo.yaml", ["engine.deepspeed={overlap_comm: true}"])
    with pytest.raises(ConfigError, match=r"^engine\.deepspeed\.overlap_comm: unknown key of DeepSpeed"):
        config.engine.kind.prepare(config)


def test_keys_that_are_there_twice_or_files_that_are_none_are_told(tmp_path: Path) -> None:
    (tmp_path / "twice.json").write_text('{"bf16": {"enabled": true}, "bf16": {}}')
    with pytest.raises(ConfigError, match=r"twice\.json.*key 'bf16' is there twice"):
        split(tmp_path / "twice.json")
    (tmp_path / "deep.json").write_text("[" * 100_000)
    with pytest.raises(ConfigError, match=r"deep\.json"):
        split(tmp_path / "deep.json")
    with pytest.raises(ConfigError, match="not a file"):
        split(tmp_path)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"D2FT": {}}, "D2FT: no section of DeepSpeed's; write d2ft"),
        (
            {},
            'd2ft: .* no such section, or an empty one; add "d2ft": {"compute_budget": 0.6, "total_steps": N}',
        ),
        ({"d2ft": [1]}, r"d2ft=\[1\]: holds no settings"),
        ({"d2ft": {"plan": {}}}, "d2ft.plan: no section here; give its keys to the d2ft section itself"),
        (
            {"d2ft": {"micro_batches": 2}},
            "d2ft.micro_batches=2: DeepSpeed's gradient_accumulation_steps says it",
        ),
    ],
)
def test_a_section_that_is_none_or_elsewhere_is_told(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=f"^{told}"):
        require_length(split(settings)[1], "d2ft.")
