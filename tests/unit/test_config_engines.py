"""Settings of engines whose ranks hold a part of the model: what is refused, and with which fix."""

from __future__ import annotations

import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from d2ft_hpc.config import EngineConfig, read_config
from d2ft_hpc.engines.deepspeed import deepspeed_config
from d2ft_hpc.engines.kinds.table import ENGINES
from d2ft_hpc.engines.zero import ZeroRules
from d2ft_hpc.errors import ConfigError
from d2ft_hpc.user_loop.section import split

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            ["engine.pipeline_stages=2", "engine.name=plain"],
            ["engine.pipeline_stages=2", "use deepspeed"],
        ),
        (["engine.tensor_parallel=2", "engine.name=ddp"], ["engine ddp a rank has the whole model"]),
        (["engine.pipeline_stages=2", "engine.name=fsdp2"], ["engine fsdp2 has no pipeline", "deepspeed"]),
        (["engine.name=fsdp2", "engine.precision=fp16"], ["engine.precision=fp16", "use bf16"]),
        (["engine.name=fsdp2", "plan.planner=samples"], ["plan.planner=samples", "engine.name=ddp"]),
        (
            ["engine.name=ddp", "engine.deepspeed={zero_optimization: {stage: 1}}"],
            ["engine ddp does not read it", "remove it"],
        ),
        (["engine.tensor_parallel=2", "engine.precision=fp16"], ["engine.precision=fp16", "use bf16"]),
        (
            ["engine.pipeline_stages=2", "engine.deepspeed={zero_optimization: {stage: 2}}"],
            ["zero_optimization.stage=2", "use stage 0 or 1"],
        ),
        (
            ["engine.pipeline_stages=2", "engine.deepspeed={pipeline: {pipe_partitioned: true}}"],
            ["pipe_partitioned", "remove it"],
        ),
        (
            ["engine.tensor_parallel=4", "engine.deepspeed={tensor_parallel: {autotp_size: 2}}"],
            ["engine.tensor_parallel=4", "autotp_size=2", "remove one"],
        ),
        (
            ["engine.deepspeed={tensor_parallel: {autotp_size: 2, keep_module_on_host: true}}"],
            ["tensor_parallel.keep_module_on_host", "cut by head"],
        ),
        (
            ["engine.deepspeed={zero_optimization: 2}"],
            ["engine.deepspeed.zero_optimization=2", "holds settings of its own", "{stage: 1}"],
        ),
        (["engine.deepspeed={fp16: true}"], ["engine.deepspeed.fp16=True", "{enabled: true}"]),
        (
            ["engine.deepspeed={zero_optimization: {stage: [1]}}"],
            ["engine.deepspeed.zero_optimization.stage=[1]", "0, 1, 2 and 3"],
        ),
        (
            ["engine.deepspeed={tensor_parallel: {autotp_size: auto}}"],
            ["engine.deepspeed.tensor_parallel.autotp_size='auto'", "a whole number"],
        ),
        (["engine.deepspeed={pipeline: {stages: 2}}"], ["pipeline.stages=2", "set engine.pipeline_stages"]),
        (
            ["engine.cuda_graphs=true", "engine.name=deepspeed", "engine.tensor_parallel=2"],
            ["engine.cuda_graphs=true", "remove it"],
        ),
        (["engine.tensor_parallel=0"], ["engine.tensor_parallel=0", "greater than or equal to 1"]),
    ],
)
def test_refused(overrides: list[str], words: list[str]) -> None:
    with pytest.raises(ConfigError) as raised:
        read_config(CONFIGS / "demo.yaml", overrides)
    assert all(word in str(raised.value) for word in words), str(raised.value)


def test_every_engine_says_what_it_runs() -> None:
    """Each of what one of them cannot run is refused by some and taken by others, before torch is imported."""
    described = str(EngineConfig.model_fields["name"].description)
    asked = {
        "fp16": "engine.precision=fp16",
        "pipeline": "engine.pipeline_stages=2",
        "heads": "engine.tensor_parallel=2",
        "samples": "plan.planner=samples",
        "deepspeed": "engine.deepspeed={zero_optimization: {stage: 1}}",
    }
    runs: dict[str, set[str]] = {}
    for name, kind in ENGINES.items():
        assert kind.about in described
        for what, override in asked.items():
            with suppress(ConfigError):
                read_config(CONFIGS / "demo.yaml", [f"engine.name={name}", override])
                runs.setdefault(name, set()).add(what)
    assert runs == {
        "deepspeed": set(asked),
        "ddp": {"samples"},
        "fsdp2": {"heads"},
        "plain": {"samples"},
    }
    with pytest.raises(
        ConfigError, match=r"engine\.name='horovod': input should be 'deepspeed', 'ddp', 'fsdp2' or"
    ):
        read_config(CONFIGS / "demo.yaml", ["engine.name=horovod"])


def test_a_configuration_is_checked_without_torch() -> None:
    code = (
        "import sys; from d2ft_hpc.config import read_config; from pathlib import Path;"
        f"read_config(Path({str(CONFIGS / 'demo.yaml')!r})); print('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


def test_deepspeeds_older_way_to_say_stage_1_is_read_as_deepspeed_reads_it() -> None:
    for stage, said in ((1, "true"), (0, "false")):
        config = read_config(CONFIGS / "demo.yaml", [f"engine.deepspeed={{zero_optimization: {said}}}"])
        assert config.engine.zero_stage == stage
        settings, _ = split({"zero_optimization": bool(stage)})
        assert ZeroRules.of(settings).stage == stage


def test_autotps_key_says_how_many_ranks_share_a_block() -> None:
    config = read_config(
        CONFIGS / "demo.yaml", ["engine.deepspeed={tensor_parallel: {autotp_size: 2}}", "plan.planner=joint"]
    )
    assert config.engine.tensor_ranks == 2
    settings = deepspeed_config(
        config.engine.deepspeed, micro_batch_size=4, slots=2, precision="fp32", gradient_clipping=None
    )
    assert "tensor_parallel" not in settings  # DeepSpeed would cut the blocks again


def test_the_stage_of_zero_is_the_same_wherever_it_is_read() -> None:
    for settings, precision, stage in (
        ({}, "fp32", 0),
        ({}, "fp16", 1),
        ({"zero_optimization": {"overlap_comm": False}}, "fp16", 1),
        ({"zero_optimization": {"stage": 2}}, "fp16", 2),
    ):
        engine = EngineConfig(deepspeed=settings, precision=precision)
        complete = deepspeed_config(
            settings, micro_batch_size=4, slots=2, precision=precision, gradient_clipping=None
        )
        assert engine.zero_stage == complete["zero_optimization"]["stage"] == stage
        assert engine.data_parallel == f"zero{stage}"


@pytest.mark.parametrize(("file", "parts"), [("demo_pipeline.yaml", (2, 1)), ("demo_tensor.yaml", (1, 2))])
def test_ready_configurations(file: str, parts: tuple[int, int]) -> None:
    config = read_config(CONFIGS / file)
    assert (config.engine.pipeline_stages, config.engine.tensor_ranks) == parts
    assert config.plan.planner == "makespan"
    assert config.model.weights == "pretrained"


@pytest.mark.parametrize(
    ("overrides", "launched"),
    [
        ([], True),
        (["engine.name=ddp"], True),
        (["plan.planner=static"], True),
        (["plan.planner=joint"], False),
        (["plan.planner=joint", "engine.cuda_graphs=true"], True),
        (["engine.cuda_graphs=false"], False),
        (["engine.precision=fp16"], False),
        (["engine.deepspeed.zero_optimization.stage=3"], False),
        (["engine.deepspeed.zero_optimization={stage: 1, offload_optimizer: {device: cpu}}"], False),
        (["engine.tensor_parallel=2"], False),
        (["engine.activation_checkpointing=true"], False),
    ],
)
def test_cuda_graphs_are_made_where_they_pay_or_are_asked_for(overrides: list[str], launched: bool) -> None:
    config = read_config(CONFIGS / "dinov2_vits14.yaml", overrides)
    assert config.launches_graphs is launched
