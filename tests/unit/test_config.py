"""The configuration: overrides, and messages that name key, value and fix."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
import timm

import d2ft_hpc.demo.model  # noqa: F401
from d2ft_hpc.cli import main
from d2ft_hpc.config import RunConfig, read_config
from d2ft_hpc.config_faults import REPLACED
from d2ft_hpc.config_file import read_values
from d2ft_hpc.engines.deepspeed import deepspeed_config
from d2ft_hpc.errors import ConfigError
from d2ft_hpc.user_loop.section import split
from tests import key_reference

DEMO = Path(__file__).parents[2] / "configs" / "demo.yaml"


def test_overrides_replace_the_files_values() -> None:
    config = read_config(
        DEMO, ["plan.compute_budget=0.5", "optimizer.learning_rate=2e-4", "data.classes=[1,2]"]
    )
    assert config.plan.compute_budget == 0.5
    assert config.optimizer.learning_rate == 2e-4
    assert config.data.classes == [1, 2]
    assert config.run.name == "demo"


def test_the_effective_configuration_reads_back(tmp_path: Path) -> None:
    config = read_config(DEMO, ["plan.replan.every=3 epochs"])
    (tmp_path / "effective.yaml").write_text(config.to_yaml())
    assert read_config(tmp_path / "effective.yaml") == config


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("plan.compute_buget=0.5", ["plan.compute_buget", "0.5", "did you mean plan.compute_budget?"]),
        ("compute_budget=0.5", ["compute_budget", "did you mean plan.compute_budget?"]),
        ("plan.replan.evry=2", ["plan.replan.evry", "did you mean plan.replan.every?"]),
        ("nonsense=1", ["nonsense", "valid here: run, model"]),
        ("data.bogus=1", ["data.bogus: unknown key (value 1); valid here: name, root"]),
        ("optimizer.bogus=1", ["optimizer.bogus: unknown key", "valid here: name, learning_rate"]),
        ("plan.replan_every=2", ["did you mean plan.replan.every?"]),
        ("optimiser.name=sgd", ["did you mean optimizer?"]),
        ("budget=0.5", ["budget: unknown key", "did you mean plan.compute_budget, plan.token_budget,"]),
        (
            "plan.budget=0.5",
            ["plan.budget: unknown key", "did you mean plan.compute_budget, plan.token_budget,"],
        ),
        ("plan.compute_budget=0", ["plan.compute_budget=0", "greater than 0"]),
        ("plan.compute_budget=1.5", ["plan.compute_budget=1.5", "less than or equal to 1"]),
        ("plan.compute_budget=60", ["plan.compute_budget=60", "write it as a share, 0.6 for 60 %"]),
        ("plan.compute_budget=60%", ["plan.compute_budget='60%'", "write it as a share, 0.6 for 60 %"]),
        ("plan.options.most_shortcut=50", ["plan.options.most_shortcut=50", "0.5 for 50 %"]),
        ("data.validation_fraction=10", ["data.validation_fraction=10", "write it as a share, 0.1 for 10 %"]),
        ("optimizer.warmup_share=5", ["optimizer.warmup_share=5", "write it as a share, 0.05 for 5 %"]),
        ("data.slots=1.5", ["data.slots=1.5", "integer"]),
        ("data.classes=[cat]", ["data.classes=['cat']: classes are told by their numbers", "write [0, 3]"]),
        ("data.classes=cat", ["data.classes='cat': classes are told by their numbers"]),
        ("train.epochs=many", ["train.epochs='many'", "integer"]),
        ("plan.planner=greedy", ["plan.planner='greedy'", "'joint'"]),
        ("plan.planner=magic", ["plan.planner='magic'", "'joint'"]),
        (
            "plan.options.full_share=0.5",
            ["plan.options={'full_share': 0.5}", "joint has no option full_share"],
        ),
        ("plan.options.most_shortcut=2", ["plan.options.most_shortcut=2", "less than or equal to 1"]),
        (
            "plan.most_shortcut=0",
            ["plan.most_shortcut: unknown key", "did you mean plan.options.most_shortcut?"],
        ),
        (
            "plan.forward_score=fischer",
            ["plan.forward_score='fischer': did you mean 'fisher'?"],
        ),
        ("plan.planner=token", ["plan.planner='token': did you mean 'tokens'?"]),
        ("plan.backward_score=x", ["plan.backward_score='x'", "'gradient_magnitude', 'taylor' or"]),
        ("plan.coverage=1", ["plan.coverage: unknown key"]),
        ("train.checkpoint_every=5", ["train.checkpoint_every=5", "such as '10 minutes' or '50 steps'"]),
        ("train.checkpoint_every=1.5 epochs", ["train.checkpoint_every='1.5 epochs'"]),
        ("train.checkpoint_every=0 steps", ["train.checkpoint_every='0 steps'"]),
        ("plan.options=3", ["plan.options=3", "section of options"]),
        ("run.name=a/b", ["run.name='a/b'"]),
        ("data.timm={re_prob: 0.1}", ["data.timm: re_prob: not read with data.augment=auto"]),
        ("plan.replan.every=3", ["plan.replan.every=3: write so many epochs or steps", "'1 epoch'"]),
        ("plan.replan.every=3 minutes", ["plan.replan.every='3 minutes': write so many epochs or steps"]),
        ("optimizer.few_full_exponent=0.5", ["optimizer.few_full_exponent: unknown key"]),
        ("engine.repeat_out_of_memory=true", ["engine.repeat_out_of_memory: unknown key"]),
        ("engine.precision=fp8", ["engine.precision='fp8'", "'bf16'"]),
        ("no_value", ["'no_value'", "key=value"]),
        ("data.timm.mixup_alpha=1e-300", ["data.timm.mixup_alpha=1e-300", "0, or from 0.001 to 1000"]),
        ("data.workers=100000", ["data.workers=100000", "1024"]),
        ("run.name=..", ["run.name='..'", "use letters, digits, _, - and . alone"]),
        ("run.name=.hidden", ["run.name='.hidden'"]),
        ("run.name=", ["run.name=''"]),
        ("run.folder=", ["run.folder=''"]),
        ("optimizer.learning_rate=.inf", ["optimizer.learning_rate=inf", "finite"]),
        ("optimizer.weight_decay=.nan", ["optimizer.weight_decay=nan", "finite"]),
        ("launch.stall_seconds=1e30", ["launch.stall_seconds=1e+30", "less than or equal to"]),
        (f"data.slots={10**30}", ["data.slots=1", "at most 2147483647"]),
        (
            "train.resume=12",
            ["train.resume='12': input should be a valid boolean, or input should be 'auto'"],
        ),
        ("model.lora={rnk: 4}", ["model.lora.rnk: unknown key", "did you mean model.lora.rank?"]),
        ("run.seed.x=1", ["run.seed={'x': 1}", "integer"]),
        ("run.name=[", ["run.name='['", "not readable as YAML", "quote it"]),
        ("run.name=@scratch", ["run.name='@scratch'", "quote it"]),
        ("model.options={a: 1, a: 2}", ["key a twice"]),
        ("data.root=!!python/object/apply:os.getcwd []", ["could not determine a constructor"]),
        (f"run.folder={'[' * 5000}", ["nested too deeply"]),
        (f"model.options={'{a: ' * 40}1{'}' * 40}", ["model.options=", "nested too deeply"]),
        (f"model.options.{'.'.join('a' * 3000)}=1", ["model.options.a.a", "sections inside each other"]),
        (f"data.root=[{'x' * 5000}]", ["data.root=['xxx", "...", "string"]),
    ],
)
def test_faults_name_key_value_and_fix(override: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        read_config(DEMO, ["plan.planner=joint", override])
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("run.name=no", "no"),
        ("run.name=yes", "yes"),
        ("run.name=12345", "12345"),
        ("run.name=0012", "0012"),
        ("run.name=1e5", "1e5"),
        ("run.name=1_000", "1_000"),
        ("run.name=2024-01-01", "2024-01-01"),
        ("run.name=null", "null"),
        ("run.folder=on", "on"),
        ("run.folder=12:30", "12:30"),
        ("data.root=~", None),
        ("model.weights=off", "off"),
        ("model.weights=null", None),
        ("model.weights=", None),
        ("launch.stop_signals=[10, no]", ["10", "no"]),
        ("train.resume=yes", True),
        ("train.checkpoint_every=1.5minutes", "1.5minutes"),
        ("train.evaluate_at_start=off", False),
        ("optimizer.learning_rate=1e-4", 1e-4),
        ("model.options={img_size: 64, flag: no, text: 'no', when: 2024-01-01}",
         {"img_size": 64, "flag": False, "text": "no", "when": "2024-01-01"}),
    ],
)  # fmt: skip
def test_a_key_that_holds_text_gets_what_was_written(tmp_path: Path, override: str, value: Any) -> None:
    """On the command line, in a file, and in the effective configuration of a run."""
    key, _, text = override.partition("=")
    section, _, name = key.partition(".")
    (tmp_path / "file.yaml").write_text(f"base: {DEMO}\n{section}: {{{name}: {text}}}\n")
    for config in (read_config(DEMO, [override]), read_config(tmp_path / "file.yaml")):
        assert getattr(getattr(config, section), name) == value
        (tmp_path / "effective.yaml").write_text(config.to_yaml())
        assert read_config(tmp_path / "effective.yaml") == config
        assert read_values(tmp_path / "effective.yaml") == config.model_dump()


def test_references_reach_keys_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    config = read_config(
        DEMO, ["run.seed=007", "run.name=s${run.seed}-${model.name}", "data.slots=${run.seed}"]
    )
    assert (config.run.name, config.data.slots) == ("s007-vit_digits_demo", 7)
    for value in (
        "${oc.env:HF_TOKEN}",
        "a${oc.decode:x}",
        "${HF_TOKEN}",
        "${oc.select:run.seed}",
        "${",
        "${}",
    ):
        with pytest.raises(ConfigError, match=r"run\.name='.*not for environment variables") as caught:
            read_config(DEMO, [f"run.name={value}"])
        assert "hf_secret" not in str(caught.value)
    with pytest.raises(ConfigError, match=r"run\.folder is no short value of its own"):
        read_config(DEMO, ["run.folder=x${run.name}", "run.name=${run.folder}"])


def test_a_file_that_stands_for_any_number_of_values_is_refused(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 10)]
    (tmp_path / "bomb.yaml").write_text("\n".join(lines))
    with pytest.raises(ConfigError, match=r"bomb\.yaml.*more than 10000 values"):
        read_config(tmp_path / "bomb.yaml")
    (tmp_path / "large.yaml").write_text("# " + "x" * (1 << 20))
    with pytest.raises(ConfigError, match="larger than 1 MiB"):
        read_config(tmp_path / "large.yaml")
    os.mkfifo(tmp_path / "fifo.yaml")
    with pytest.raises(ConfigError, match="not a file"):
        read_config(tmp_path / "fifo.yaml")


def test_faults_between_fields_and_all_at_once() -> None:
    with pytest.raises(ConfigError, match=r"engine\.precision=fp16"):
        read_config(DEMO, ["engine.name=plain", "engine.precision=fp16"])
    with pytest.raises(ConfigError) as caught:
        read_config(DEMO, ["data.slots=0", "train.epochs=0"])
    assert len(str(caught.value).splitlines()) == 2


@pytest.mark.parametrize("content", ["[1, 2]", "a: [", "\x00", ""])
def test_files_that_are_no_configuration(tmp_path: Path, content: str) -> None:
    (tmp_path / "bad.yaml").write_text(content)
    with pytest.raises(ConfigError):
        read_config(tmp_path / "bad.yaml")
    with pytest.raises(ConfigError, match="no such"):
        read_config(tmp_path / "absent.yaml")


def test_yaml_tags_make_no_objects(tmp_path: Path) -> None:
    (tmp_path / "evil.yaml").write_text(f"run: !!python/object/apply:os.mkdir ['{tmp_path}/made']")
    with pytest.raises(ConfigError):
        read_config(tmp_path / "evil.yaml")
    assert not (tmp_path / "made").exists()


def test_every_field_is_documented_or_says_it_all() -> None:
    undocumented = [
        f"{section}.{name}"
        for section, info in RunConfig.model_fields.items()
        for name, field in info.annotation.model_fields.items()  # type: ignore[union-attr]
        if field.description is None
    ]
    assert set(undocumented) <= {
        "run.seed", "data.name", "optimizer.name", "optimizer.learning_rate", "optimizer.weight_decay",
        "train.epochs", "train.evaluate_every_epochs",
        "plan.replan", "engine.precision",
    }  # fmt: skip


def test_a_key_that_went_is_told_with_what_does_its_work(tmp_path: Path) -> None:
    for key, fix in REPLACED.items():
        with pytest.raises(ConfigError, match=rf"^{re.escape(f'{key}: no longer a key (value 1); {fix}')}$"):
            read_config(DEMO, ["plan.planner=joint", "model.lora={}", f"{key}=1"])
        for new in re.findall(r"\b(?:data|plan|run)\.[\w.]+\w", fix):
            assert read_config(DEMO, [f"{new}=1 epoch"] if new.endswith("every") else [f"{new}=0"]), new
    with pytest.raises(ConfigError, match=r"^d2ft\.replan\.unit: no longer a key .*every says it"):
        split({"d2ft": {"replan": {"every": "2 steps", "unit": "steps"}}})


def test_a_configuration_stays_within_70_keys() -> None:
    """`plan.options` is one: what it holds belongs to the planners."""
    keys = set(re.findall(r"^\| `(\w+\.[\w.]+)` \|", key_reference.document(), re.MULTILINE))
    ours = {key for key in keys if key.split(".")[0] in RunConfig.model_fields and "plan.options." not in key}
    assert 0 < len(ours - {"model.lora"}) <= 70  # a section


def complete(settings: dict[str, Any], precision: str = "fp32") -> dict[str, Any]:
    return deepspeed_config(
        settings, micro_batch_size=4, slots=2, precision=precision, gradient_clipping=None
    )


def test_deepspeed_settings_that_cannot_run_plans_are_refused() -> None:
    assert complete({})["gradient_clipping"] == 0.0
    assert complete({}, "fp16")["zero_optimization"]["stage"] == 1
    assert complete({"zero_optimization": {"stage": 1, "overlap_comm": False}})["zero_optimization"] == {
        "stage": 1,
        "overlap_comm": False,
    }
    with pytest.raises(ConfigError, match=r"stage=4: ZeRO has the stages 0, 1, 2 and 3"):
        read_config(DEMO, ["engine.deepspeed.zero_optimization.stage=4"])
    with pytest.raises(ConfigError, match=r"engine\.deepspeed\.sparse_gradients=True.*remove it"):
        complete({"sparse_gradients": True})
    with pytest.raises(ConfigError, match=r"stage=0 with fp16"):
        complete({"zero_optimization": {"stage": 0}}, "fp16")
    with pytest.raises(ConfigError, match=r"engine\.deepspeed\.train_batch_size"):
        complete({"train_batch_size": 8})


def test_a_base_is_overridden_by_the_file_and_both_by_overrides(tmp_path: Path) -> None:
    (tmp_path / "middle.yaml").write_text(
        f"base: {DEMO}\nplan: {{compute_budget: 0.5}}\ntrain: {{epochs: 2}}"
    )
    (tmp_path / "top.yaml").write_text("base: middle.yaml\nplan: {compute_budget: 0.4}")
    config = read_config(tmp_path / "top.yaml", ["optimizer.learning_rate=3e-4"])
    assert (config.plan.compute_budget, config.train.epochs) == (0.4, 2)
    assert config.optimizer.learning_rate == 3e-4
    assert config.data == read_config(DEMO).data
    (tmp_path / "middle.yaml").write_text("base: top.yaml")
    with pytest.raises(ConfigError, match=r"^base: \S+ is a base of itself$"):
        read_config(tmp_path / "top.yaml")
    (tmp_path / "middle.yaml").write_text("base: absent.yaml")
    with pytest.raises(ConfigError, match=r"base='absent\.yaml': no such file"):
        read_config(tmp_path / "top.yaml")


def test_long_chains_of_bases_are_refused_by_their_length(tmp_path: Path) -> None:
    """Not by how deep the interpreter can go."""
    for index in range(1200):
        (tmp_path / f"{index}.yaml").write_text(f"base: {index + 1}.yaml")
    (tmp_path / "1200.yaml").write_text(f"base: {DEMO}")
    assert read_config(tmp_path / "1169.yaml") == read_config(DEMO)
    for start in (0, 1168):
        with pytest.raises(
            ConfigError, match=r"^base: \S+ lies below 33 other files, at most 32 can; put .*$"
        ):
            read_config(tmp_path / f"{start}.yaml")


@pytest.mark.parametrize(
    ("base", "words"),
    [
        ("x" * 5000, "a path has at most 4095 bytes, and 255 between two slashes"),
        ("a\\0b", "a path has no NUL character"),
        (".", r"no such file beside \S*top\.yaml"),
        ("/dev/zero", r"no such file beside \S*top\.yaml"),
        ("$HOME/a.yaml", r"variables are not filled in: write out what \$HOME stands for"),
    ],
)
def test_a_base_that_is_no_file_is_refused(base: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "top.yaml").write_text(f'base: "{base}"')
    with pytest.raises(ConfigError, match=rf"^base=.{{1,99}}: {words}$"):
        read_config(tmp_path / "top.yaml")


@pytest.mark.parametrize("path", sorted(DEMO.parent.rglob("*.yaml")), ids=lambda path: path.stem)
def test_the_shipped_configurations_are_valid(path: Path) -> None:
    config = read_config(path)
    assert timm.is_model(config.model.name)


def test_several_configurations_are_checked_before_the_first_runs(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bad.yaml").write_text(f"base: {DEMO}\nplan: {{compute_buget: 0.5}}")
    command = ["train", str(DEMO), str(tmp_path / "bad.yaml"), f"run.folder={tmp_path / 'runs'}"]
    assert main(command) == 1
    assert "did you mean plan.compute_budget?" in capfd.readouterr().err
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    assert main(command) == 1
    assert "2 configurations under one launcher" in capfd.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_members_of_lists_are_no_per_cent() -> None:
    with pytest.raises(
        ConfigError, match=r"^plan\.options\.sides\.1=3: input should be less than or equal to 1$"
    ):
        read_config(DEMO, ["plan.planner=tokens", "plan.options.sides=[0.5, 3]"])
