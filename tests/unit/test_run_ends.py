"""How runs end that diverge, are refused, are resumed for another length, or have lost their record."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from d2ft_hpc import results
from d2ft_hpc.config import RunConfig, read_config
from d2ft_hpc.doctor.work import check_plans
from d2ft_hpc.engines.optimizer import build_schedule
from d2ft_hpc.engines.portable import restore_schedule, schedule_numbers
from d2ft_hpc.errors import CheckpointError, ConfigError, DivergedError, LostResultsError, PlanError
from d2ft_hpc.launch.control import SoloControl
from d2ft_hpc.launch.step_gate import Action
from d2ft_hpc.launch.watch import Watch
from d2ft_hpc.lifecycle.foresight import price_of, trial_plan
from d2ft_hpc.planning import Operation, SkipPlan
from d2ft_hpc.report import report
from d2ft_hpc.results import ResultsWriter
from d2ft_hpc.results.superseded import set_aside
from d2ft_hpc.training import plan_costs
from d2ft_hpc.training.checkpoint import complete_checkpoints, verify
from d2ft_hpc.training.finite import require_finite
from d2ft_hpc.training.job import set_up
from d2ft_hpc.training.loop import train
from d2ft_hpc.training.model_placement import place_in_order
from d2ft_hpc.training.plan_context import plan_context
from d2ft_hpc.training.plan_costs import costs_unmeasured
from d2ft_hpc.training.resume import check_same, choose_start

EVERY_EPOCH = "train.checkpoint_every=1 epochs"
STEPS = 6  # of an epoch
DEPTH = 2  # of the model


def config_in(folder: Path, *overrides: str) -> RunConfig:
    quick = ("data.micro_batch_size=8", "data.slots=4", "data.train_fraction=0.25")
    small = (
        "data.image_size=16",
        "model.options.img_size=16",
        f"model.options.depth={DEPTH}",
        "model.weights=null",
    )
    plain = ("engine.name=plain", "engine.device=cpu", "plan.planner=paper", "train.evaluate_at_start=false")
    return read_config(
        Path("configs/demo.yaml"),
        [f"run.folder={folder}", *quick, *small, *plain, "train.epochs=1", *overrides],
    )


def run(folder: Path, *overrides: str) -> Path:
    """The run's folder, after its end."""
    config, control = config_in(folder, *overrides), SoloControl()
    with Watch(control, run_folder=config.run_folder) as watch:
        assert train(config, control, torch.device("cpu"), "single process", watch)
    return config.run_folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder around a run of two epochs, with two plans and a checkpoint after each epoch."""
    folder = tmp_path_factory.mktemp("runs")
    run(folder, "train.epochs=2", "plan.replan.every=1 epoch", EVERY_EPOCH)
    return folder


def copy_of(finished: Path, folder: Path, *, unfinished: bool = False) -> Path:
    shutil.copytree(finished, folder, dirs_exist_ok=True)
    if unfinished:
        (folder / "demo" / "model.safetensors").unlink()
        shutil.rmtree(folder / "demo" / "checkpoints" / f"step-{2 * STEPS:08d}")
    return folder / "demo"


def test_a_run_that_diverges_ends_with_what_it_had(tmp_path: Path) -> None:
    with pytest.raises(DivergedError) as error:
        run(tmp_path, "optimizer.learning_rate=1e30", "train.checkpoint_every=1 steps")
    text = str(error.value)
    assert text.startswith("the loss of step 2 is nan: lower optimizer.learning_rate (1e+30)")
    assert error.value.exit_status == 76
    # What was saved before step 2 has finite weights, but from them came the loss that is not.
    assert text.endswith("no checkpoint is from before that")
    assert not (tmp_path / "demo" / "model.safetensors").exists()
    assert not list((tmp_path / "demo").rglob("*.building"))
    with results.open(tmp_path / "demo") as record:
        assert not record.complete
        assert "diverged" in record.table("events")["kind"].tolist()


def test_a_report_tells_a_saved_stop_from_a_crash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class StopSoon(Watch):
        def at_step_boundary(self, steps_done: int) -> Action | None:
            if steps_done == 1:
                self.request("stop")
            return super().at_step_boundary(steps_done)

    config, control = config_in(tmp_path, "train.epochs=9"), SoloControl()
    with StopSoon(control, run_folder=config.run_folder) as watch:
        assert not train(config, control, torch.device("cpu"), "single process", watch)
    assert f"{config.run_folder / 'results.h5'}  (stopped; can be resumed)" in report([config.run_folder])

    def crash(*_: object) -> None:
        raise RuntimeError("crash")

    monkeypatch.setattr(Watch, "at_step_boundary", crash)
    with pytest.raises(RuntimeError, match="crash"):
        run(tmp_path, "train.epochs=9", "train.resume=auto")
    assert "(did not end in order)" in report([config.run_folder])


def test_weights_that_are_not_finite_are_named() -> None:
    require_finite({"a": torch.ones(2), "b": torch.ones(2, dtype=torch.long)})
    with pytest.raises(DivergedError, match="1 of 2 weights are not finite, the first is b"):
        require_finite({"a": torch.ones(2), "b": torch.tensor([1.0, float("inf")])})


def test_a_resumed_run_has_the_learning_rates_of_its_new_length(finished: Path, tmp_path: Path) -> None:
    copy_of(finished, tmp_path, unfinished=True)
    folder = run(tmp_path, "train.epochs=3", "plan.replan.every=1 epoch", "train.resume=auto")
    config = config_in(tmp_path, "train.epochs=3")
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=config.optimizer.learning_rate)
    schedule = build_schedule(optimizer, config.optimizer, 3 * STEPS)
    rates = []
    for _ in range(3 * STEPS):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    resumed = results.open(folder).table("steps")["learning_rate"]
    assert resumed[STEPS:].tolist() == pytest.approx(rates[STEPS:], rel=1e-6)


def test_a_restored_schedule_goes_on_by_its_own_rates() -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))

    def begin(rate: float, factor: float) -> torch.optim.lr_scheduler.LambdaLR:
        optimizer = torch.optim.SGD([parameter], lr=rate)
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: factor / (step + 1))

    short, long = begin(1.0, 1.0), begin(1.0, 8.0)
    for _ in range(3):
        short.optimizer.step()
        short.step()
    restore_schedule(long, schedule_numbers(short))
    assert long.get_last_lr() == [long.optimizer.param_groups[0]["lr"]] == [8.0 / 4]
    long.optimizer.step()
    long.step()
    assert long.get_last_lr() == [8.0 / 5]


def test_a_finished_run_and_another_number_of_epochs(
    finished: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = copy_of(finished, tmp_path)
    same = ("plan.replan.every=1 epoch", EVERY_EPOCH)
    auto = (*same, "train.resume=auto")
    with pytest.raises(ConfigError, match=r"is finished after 2; set it back, or higher to go on, or choose"):
        choose_start(config_in(tmp_path, *auto), SoloControl())
    start = choose_start(config_in(tmp_path, *auto, "train.epochs=3"), SoloControl())
    assert start.position.steps_done == 2 * STEPS
    assert "train.epochs=3, finished with 2: goes on from step-00000012" in capfd.readouterr().err
    shutil.rmtree(folder / "checkpoints")
    with pytest.raises(ConfigError, match=r"train\.epochs=1: .* is finished after 2; set it back or choose"):
        choose_start(config_in(tmp_path, *auto), SoloControl())
    for resume in ("auto", "true"):
        with pytest.raises(CheckpointError, match=r"no checkpoint to go on from: .*model\.weights="):
            choose_start(
                config_in(tmp_path, *same, "train.epochs=3", f"train.resume={resume}"), SoloControl()
            )


def test_a_finished_run_of_a_share_of_its_steps_goes_on_from_its_end(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    half = ("train.steps_share=0.5", "plan.planner=tokens", EVERY_EPOCH)
    run(tmp_path, *half, "train.epochs=3")
    again = (*half, "train.resume=auto")
    run(tmp_path, *again, "train.epochs=3")
    assert capfd.readouterr().out.endswith("to train further, raise train.epochs\n")
    assert len(results.open(tmp_path / "demo").table("steps")["step"]) == 1.5 * STEPS
    folder = run(tmp_path, *again, "train.epochs=5")  # first the rest of the epoch that was cut short
    told = "image sizes of a run of 5; its steps on large images come on top of the compute budget"
    assert told in capfd.readouterr().err
    steps = results.open(folder).table("steps")
    assert steps["step"].tolist() == list(range(round(2.5 * STEPS)))
    assert steps["epoch"].tolist() == [step // STEPS for step in steps["step"]]


def test_a_run_of_a_share_of_its_steps_tells_the_same_compute_everywhere(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    settings = ("train.steps_share=0.5", "train.epochs=3", "plan.planner=tokens")
    folder = run(tmp_path, *settings)
    out = capfd.readouterr().out
    told = re.search(
        r"the run takes ((\S+)% of the dense compute of its 9 steps, (\S+)% of that of all 3 epochs)", out
    )
    assert told, out
    assert f": {told[2]}% of what full size takes in these 9 steps" in out
    assert f"epoch 2  step 9/{round(1.5 * STEPS)}" in out
    assert "evaluation after 1 epoch: " in out
    assert "evaluation after 9 steps (1.5 epochs): " in out
    dense = results.open(folder).table("steps")["dense_flops"]
    of_epochs = dense.sum() / (3 * dense[:STEPS].sum())  # by samples, which not all steps have as many of
    assert float(told[3]) == pytest.approx(float(told[2]) * of_epochs, abs=0.1)
    assert f"  {told[3]}  " in report([folder])
    (finding,) = check_plans(set_up(config_in(tmp_path, *settings), SoloControl(), torch.device("cpu")))
    assert told[1] in finding.text


def test_over_many_epochs_the_budget_of_all_steps_is_spent_on_fewer_of_them(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    settings = (
        "plan.planner=tokens",
        "plan.compute_budget=0.4",
        "train.epochs=10",
        "train.evaluate_every_epochs=10",
    )
    folder = run(tmp_path, *settings)
    steps = results.open(folder).table("steps")
    assert len(steps["step"]) == round(0.8 * 10 * STEPS)
    dense = 10 * steps["dense_flops"][:STEPS].sum()
    of_one_step = steps["dense_flops"][0].sum() / dense
    assert 0.4 - of_one_step < steps["executed_flops"].sum() / dense <= 0.4
    planned = re.search(
        r", (\S+)% of that of all 10 epochs \(train.steps_share=auto\)", capfd.readouterr().out
    )
    assert planned is not None
    assert float(planned[1]) == round(100 * steps["executed_flops"].sum() / dense, 1)
    assert f"  {planned[1]}  " in report([folder])

    config = config_in(tmp_path, *settings, "plan.compute_budget=0.1")
    with pytest.raises(
        PlanError, match=r"^plan.compute_budget=0.1 in 50.0% of the steps \(train.steps_share=auto\): "
    ):
        _ = set_up(config, SoloControl(), torch.device("cpu")).curve


@pytest.mark.parametrize(
    ("settings", "share"),
    [
        (("train.epochs=9",), 1),
        (("train.epochs=10",), 0.8),
        (("train.epochs=10", "train.steps_share=1"), 1),
        (("train.epochs=10", "train.steps_share=0.5"), 0.5),
        (("train.epochs=10", "plan.planner=joint"), 1),
        (("train.epochs=10", "plan.file=plan.npz"), 1),
        (("train.epochs=10", "plan.compute_budget=0.6"), 1),
    ],
)
def test_all_steps_are_run_where_they_are_asked_for_or_few(
    tmp_path: Path, settings: tuple[str, ...], share: float
) -> None:
    budget = ("plan.planner=tokens", "plan.compute_budget=0.4")
    assert config_in(tmp_path, *budget, *settings).steps_share == pytest.approx(share)


@pytest.mark.parametrize("resume", ["auto", "true"])
def test_a_finished_run_that_is_resumed_says_so_and_stays_as_it_is(
    finished: Path, tmp_path: Path, resume: str, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = copy_of(finished, tmp_path)
    same = ("train.epochs=2", "plan.replan.every=1 epoch", EVERY_EPOCH, f"train.resume={resume}")
    told = f"{folder} is finished: nothing is left to do; to train further, "
    before = contents(folder)
    run(tmp_path, *same)
    assert capfd.readouterr().out == f"{told}raise train.epochs\n"
    assert contents(folder) == before
    fix = f"choose another run.name, with model.weights={folder / 'model.safetensors'}"
    newest = folder / "checkpoints" / f"step-{2 * STEPS:08d}"
    (newest / "position.json").write_text("{")
    run(tmp_path, *same)
    assert capfd.readouterr().out == f"{told}{fix}\n"
    shutil.rmtree(newest)  # from the one before, an epoch would be lost
    before = contents(folder)
    run(tmp_path, *same)
    assert capfd.readouterr().out == f"{told}{fix}\n"
    with pytest.raises(CheckpointError, match=f"is of before its end, step-{STEPS:08d}, .*: {fix}"):
        run(tmp_path, *same, "train.epochs=3")
    assert contents(folder) == before
    shutil.rmtree(folder / "checkpoints")
    run(tmp_path, *same)
    assert capfd.readouterr().out == f"{told}{fix}\n"


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_more_steps_than_the_run_is_to_have_are_told(finished: Path, tmp_path: Path) -> None:
    folder = copy_of(finished, tmp_path / "fewer")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"train\.epochs=1 makes 6 steps, but the run in .* has done 12"):
        run(tmp_path / "fewer", "plan.replan.every=1 epoch", "train.resume=auto")


@pytest.mark.parametrize(
    ("before", "after", "named"),
    [
        ((), ("model.options.img_size=48",), "model.options"),
        (("data.augment=timm", "data.timm.re_prob=0.1"), ("data.augment=timm",), "data.timm"),
        ((), ("model.lora.rank=4",), "model.lora"),
        ((), ("optimizer.learning_rate=0.1",), "optimizer.learning_rate"),
        ((), ("optimizer.warmup_share=0.3",), "optimizer.warmup_share"),
        ((), ("train.steps_share=0.5",), "train.steps_share"),
        ((), ("data.micro_batch_size=3",), "data.micro_batch_size"),
    ],
)
def test_a_setting_that_decides_losses_is_not_changed_by_a_resume(
    finished: Path, tmp_path: Path, before: tuple[str, ...], after: tuple[str, ...], named: str
) -> None:
    folder = copy_of(finished, tmp_path)
    (folder / "config.yaml").write_text(config_in(tmp_path, *before).to_yaml())
    with pytest.raises(ConfigError, match=rf"^where to start: {named}=.*the run in .* was begun with"):
        choose_start(config_in(tmp_path, *after, "train.resume=true"), SoloControl())


@pytest.mark.parametrize(
    ("older", "after", "told"),
    [
        ({"plan": {"replan": {"every": 1, "unit": "epochs"}}}, ("plan.replan.every=1 epoch",), None),
        (
            {"data": {"mixup_alpha": 0.8, "timm": {}}},
            ("data.augment=timm", "data.timm.mixup_alpha=0.8"),
            None,
        ),
        (
            {"data": {"mixup_alpha": 0.8, "timm": {}}},
            ("data.augment=timm",),
            r"data\.timm=\{\}: .*begun with",
        ),
        (
            {"model": {"lora": {"rank": 2, "layers": ["qkv", "proj", "fc1", "fc2"]}}},
            ("model.lora.rank=2",),
            None,
        ),
        (
            {"model": {"lora": {"rank": 2, "layers": ["qkv"]}}},
            ("model.lora.rank=2",),
            r"model\.lora\.layers: ",
        ),
        ({"data": {"evaluate_on": "test", "split_seed": 0}}, (), None),
        (
            {"data": {"evaluate_on": "test"}},
            ("data.validation_fraction=0.1",),
            r"data\.evaluate_on=test: .* as with validation",
        ),
        ({"data": {"split_seed": 0}}, ("run.seed=3", "data.train_fraction=0.5"), r"data\.split_seed=0: "),
        ({"plan": {"probe_batches": 4}}, (), r"plan\.probe_batches=4: .* as with 1: go on with the version"),
        ({"plan": {"warmup_share": 0.4}}, (), r"plan\.warmup_share=0\.4: "),
    ],
)
def test_a_run_that_an_older_version_began_goes_on_if_it_means_the_same(
    tmp_path: Path, older: dict[str, dict[str, object]], after: tuple[str, ...], told: str | None
) -> None:
    config = config_in(tmp_path, *after, "train.resume=true")
    before = config.model_dump(mode="json")
    for section, values in older.items():
        for key, value in values.items():
            if isinstance(before[section].get(key), dict) and isinstance(value, dict) and value:
                before[section][key].update(value)
            else:
                before[section][key] = value
    if told is None:
        check_same(before, config)
        return
    with pytest.raises(ConfigError, match=rf"^{told}"):
        check_same(before, config)


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (("plan.file=/nope.h5",), r"planning: plan\.file=/nope\.h5: no such file"),
        (
            ("plan.file=README.md",),
            r"plan\.file=README\.md: damaged, or no HDF5 file \(file signature not found\)",
        ),
        (
            ("plan.file={other}",),
            r"plan\.file=.*other\.h5 has \(4, 9, 2\) rows, blocks and heads, but this training \(4, ",
        ),
        (
            ("plan.file={small}",),
            r"plan\.file=.*small\.h5: .*2 x 2 patches, whose costs were not counted; this run has those of full",
        ),
        (
            ("plan.compute_budget=1e-4",),
            r"plan\.compute_budget=0\.0001: .*The least feasible compute_budget is",
        ),
        (
            ("plan.compute_budget=1e-4", "plan.planner=samples"),
            r"plan\.compute_budget=0\.0001: scoring .* at least",
        ),
        (
            ("plan.communication_budget=0.1", "plan.planner=depth"),
            r"plan\.communication_budget=0\.1: .*least feasible communication budget is 0\.5",
        ),
        (
            ("plan.memory_budget=0.001", "plan.planner=random"),
            r"plan\.memory_budget=0\.001: The random plan exceeds the memory budget",
        ),
        (
            ("plan.options.most_shortcut=0", "plan.compute_budget=0.2", "plan.planner=joint"),
            r"plan\.compute_budget=0\.2, plan\.options\.most_shortcut=0: ",
        ),
    ],
)
def test_plans_that_cannot_be_are_refused_before_anything_is_evaluated_or_written(
    tmp_path: Path, overrides: tuple[str, ...], told: str, capfd: pytest.CaptureFixture[str]
) -> None:
    SkipPlan.dense(4, 1, 9, 2).write(tmp_path / "other.h5")
    SkipPlan.dense(4, 1, DEPTH, 4).at((2, 2)).write(tmp_path / "small.h5")
    with pytest.raises(PlanError, match=told):
        run(
            tmp_path,
            "train.evaluate_at_start=true",
            *(each.format(other=tmp_path / "other.h5", small=tmp_path / "small.h5") for each in overrides),
        )
    assert "evaluation" not in capfd.readouterr().out
    assert not (tmp_path / "demo" / "results.h5").exists()


def test_a_plan_from_a_file_that_skips_heads_is_told_to_cost_accuracy(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    dense = SkipPlan.dense(4, 1, DEPTH, 4)
    operations = dense.operations.copy()
    operations[0, 0, 0] = Operation.SHORTCUT
    replace(dense, operations=operations).write(tmp_path / "plan.h5")
    run(tmp_path, f"plan.file={tmp_path / 'plan.h5'}", "plan.planner=tokens")
    assert "warning: the plan skips heads, which cost" in capfd.readouterr().err
    assert not price_of(dense)


def test_demands_that_only_real_scores_can_decide_are_left_to_them(tmp_path: Path) -> None:
    """The paper's planner knows no memory budget: which of its plans keep one depends on the scores."""
    job = set_up(config_in(tmp_path, "plan.memory_budget=0.001"), SoloControl(), torch.device("cpu"))
    plan = trial_plan(plan_context(job, place_in_order(job), costs_unmeasured(job)))
    assert plan.operations.shape == job.plan_shape


@pytest.mark.parametrize(("resume", "files"), [("false", "true"), ("auto", "false")])
def test_a_run_that_was_refused_does_not_block_the_corrected_one(
    tmp_path: Path, resume: str, files: str
) -> None:
    with pytest.raises(PlanError):  # found by the plan by scores alone
        run(
            tmp_path,
            "plan.memory_budget=0.001",
            "plan.planner=paper",
            f"train.resume={resume}",
            f"results.file_per_rank={files}",
        )
    assert (tmp_path / "demo" / "results.h5").exists()
    folder = run(
        tmp_path, f"train.resume={resume}", f"results.file_per_rank={files}", "train.steps_share=0.4"
    )
    with results.open(folder) as record:
        assert record.complete
        assert record.table("steps")["step"].tolist() == [0, 1]
        assert record.config["plan"]["compute_budget"] == 0.6
    with pytest.raises(Exception, match="exists already and is not overwritten"):
        run(tmp_path, "train.steps_share=0.4")


@pytest.mark.parametrize(
    "damage",
    ["file", "both", *(pytest.param(damage, marks=pytest.mark.full) for damage in ("segments", "bytes"))],
)
def test_a_run_goes_on_without_its_record(
    finished: Path, tmp_path: Path, damage: str, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = copy_of(finished, tmp_path, unfinished=True)
    path = folder / "results.h5"
    # As of a run that was killed, whose lock ended with it.
    ResultsWriter.resume(path, last_step=STEPS - 1, flush_seconds=0)._release()
    if damage in ("file", "both"):
        path.unlink()
    if damage in ("segments", "both"):
        shutil.rmtree(folder / "results.segments")
    if damage == "bytes":
        path.write_bytes(path.read_bytes()[:1000])
    run(tmp_path, "train.epochs=2", "plan.replan.every=1 epoch", "train.resume=auto")
    assert "the record of the first 6 steps is gone" in capfd.readouterr().err
    assert (folder / "results.lost-1").exists() == (damage != "both")
    whole = results.open(finished / "demo")
    with results.open(folder) as record:
        steps = record.table("steps")
        assert steps["step"].tolist() == list(range(STEPS, 2 * STEPS))
        assert steps["loss"].tolist() == whole.table("steps")["loss"][STEPS:].tolist()
        assert set(steps["plan"].tolist()) == {1}
        assert record.table("plans")["hash"].tolist() == whole.table("plans")["hash"].tolist()
        assert record.complete
    for checkpoint in complete_checkpoints(folder / "checkpoints"):
        verify(checkpoint)


def test_a_record_that_is_being_written_is_not_set_aside(tmp_path: Path) -> None:
    with ResultsWriter(tmp_path / "results.h5"):
        with pytest.raises(Exception, match="another process writes this run"):
            set_aside(tmp_path / "results.h5")
        (tmp_path / "results.h5").unlink()
        with pytest.raises(LostResultsError):
            ResultsWriter.resume(tmp_path / "results.h5", last_step=0)


def test_caches_that_cannot_be_written_are_done_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("D2FT_HPC_CACHE", "/dev/null/cache")
    run(tmp_path, "plan.costs=measured", "train.steps_share=0.2")
    told = capfd.readouterr().err
    assert "warning: the measured costs are not kept" in told
    assert plan_costs.cache_folder() == Path("/dev/null/cache")
