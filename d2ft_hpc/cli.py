"""The command `d2ft-hpc`."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from d2ft_hpc import __version__, early_signals
from d2ft_hpc.bench.commands import add_benches
from d2ft_hpc.command import add_config, amount, config_of, on_ranks, points, share, whole_number
from d2ft_hpc.config import read_config
from d2ft_hpc.errors import UNFINISHED, PlanError
from d2ft_hpc.figures.command import add_figures
from d2ft_hpc.launch.agree import note_failure, run_guarded
from d2ft_hpc.launch.control import print_line
from d2ft_hpc.paths import path_argument
from d2ft_hpc.safe_text import say

if TYPE_CHECKING:
    import torch

    from d2ft_hpc.launch import Control
    from d2ft_hpc.launch.watch import Watch


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one subcommand and returns the exit status.

    0 done, 1 fault, 2 wrong usage, 75 to be continued (stopped, hung, or a process was lost), 76 diverged (loss or
    weights are not finite), 130 interrupted.
    """
    try:
        options = _parser().parse_args(arguments)
    except SystemExit as usage:
        if usage.code:
            note_failure("wrong usage")
        raise
    if options.run is not _train:
        early_signals.release()
    return run_guarded(None, lambda: options.run(options))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="d2ft-hpc", description="Distributed dynamic fine-tuning of vision transformers"
    )
    parser.add_argument("--version", action="version", version=__version__)
    # The deepspeed launcher puts this before a script's own arguments; the rank comes from the environment.
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    train = commands.add_parser(
        "train",
        help="fine-tune under a skip plan; start it alone or with mpirun, srun, torchrun or deepspeed",
        description="Fine-tunes a model as a YAML file says. Keys can be set after it: plan.compute_budget=0.5",
    )
    add_config(train, more="; or further YAML files")
    train.set_defaults(run=_train)

    doctor = commands.add_parser(
        "doctor",
        help="check what a run needs before it waits in a queue; start it as the run",
        description="Checks launcher, network, GPUs, file system, data, weights and time limit. Status 1: a run "
        "would fail.",
    )
    add_config(doctor)
    doctor.add_argument("--json", action="store_true", help="print one line of JSON")
    doctor.set_defaults(run=_doctor)

    score = commands.add_parser(
        "score",
        help="measure scores without training; start it as the run",
        description="Measures what a run would measure before its first step; `d2ft-hpc plan` reads the file.",
    )
    score.add_argument("output", type=path_argument, help="the file to write, such as scores.h5")
    add_config(score)
    score.set_defaults(run=_score)

    models = commands.add_parser(
        "models",
        help="which of timm's models plans can run on, and why not on others",
        description="Builds each without memory; nothing is downloaded. All of them take a few minutes.",
    )
    models.add_argument(
        "pattern", nargs="?", default="*", help="part of a name, or a pattern: 'vit_*dinov3' (default: all)"
    )
    models.set_defaults(run=_models)

    report = commands.add_parser("report", help="compare finished or running runs in a table and on a page")
    report.add_argument(
        "runs", nargs="+", type=path_argument, help="run folders or results files; the first is the baseline"
    )
    report.add_argument(
        "--html", type=path_argument, default=Path("report.html"), help="page to write (default: report.html)"
    )
    report.add_argument("--png", type=path_argument, help="also write a picture of compute and time")
    report.add_argument(
        "--reference",
        type=path_argument,
        nargs="+",
        default=[],
        metavar="RUN",
        help="runs to match, such as dense ones: says how little compute and time reaches their accuracy",
    )
    report.add_argument(
        "--margin",
        type=points,
        default=0.5,
        help="points of top-1 that may be lost against --reference (default: 0.5)",
    )
    report.set_defaults(run=_report)

    figure = commands.add_parser("figure", help="one figure of runs, or its numbers as JSON")
    add_figures(figure.add_subparsers(required=True, metavar="NAME"))

    plan = commands.add_parser(
        "plan",
        help="plan from saved scores, or look at a saved plan; needs no GPU and no MPI",
        description="Prints each device's share of the work, the predicted step time and the gap to the optimum.",
    )
    plan.add_argument(
        "scores",
        type=path_argument,
        nargs="?",
        help="run folder or results file with scores; not needed to look at a saved plan",
    )
    plan.add_argument("--index", type=int, default=-1, help="which of the file's scores (default: the last)")
    plan.add_argument(
        "--planner",
        default="makespan",
        help="a name as for plan.planner; a wrong one lists them all (default: makespan)",
    )
    plan.add_argument(
        "--load", type=path_argument, metavar="PLAN", help="look at this plan instead of solving one"
    )
    plan.add_argument(
        "--options",
        default="{}",
        metavar="YAML",
        help="settings as for plan.options, such as '{most_shortcut: 0}'",
    )
    plan.add_argument("--ranks", type=whole_number(1), default=1, help="tensor-parallel ranks")
    plan.add_argument("--stages", type=whole_number(1), default=1, help="pipeline stages")
    plan.add_argument("--speeds", type=_numbers, metavar="A,B,...", help="relative speed of each rank")
    plan.add_argument("--placed", action="store_true", help="place the heads on the ranks by their scores")
    plan.add_argument(
        "--compute-budget", type=share(), default=0.6, help="share of the dense step (default: 0.6)"
    )
    plan.add_argument("--communication-budget", type=share(), help="share of the dense step")
    plan.add_argument("--memory-budget", type=share(), help="share of the activations of a dense row")
    plan.add_argument("--save", type=path_argument, metavar="PLAN", help="where to save the plan")
    plan.add_argument("--diff", type=path_argument, metavar="PLAN", help="count what changes from this plan")
    plan.add_argument("--png", type=path_argument, help="where to write a heat map")
    plan.set_defaults(run=_plan)

    data = commands.add_parser("data", help="pack a data set into one file, or look at a packed one")
    _add_data_commands(data)

    bench = commands.add_parser("bench", help="measure the package's own parts")
    add_benches(bench.add_subparsers(required=True, metavar="WHAT"))
    return parser


def _add_data_commands(data: argparse.ArgumentParser) -> None:
    commands = data.add_subparsers(required=True, metavar="WHAT")
    pack = commands.add_parser(
        "pack",
        help="put a data set into one HDF5 file, which data.name=packed data.root=FILE reads",
        description="Parallel file systems are slow with many small files: pack them once.",
    )
    pack.add_argument(
        "name",
        choices=["cifar10", "cifar100", "stanford_cars", "image_folder", "huggingface", "webdataset", "arrays"],
        help="the data set, as for data.name; arrays: an .npz or HDF5 file of your own",
    )  # fmt: skip
    pack.add_argument("output", type=path_argument, help="the file to make")
    pack.add_argument(
        "--root", type=path_argument, required=True, help="its folder, as for data.root; for arrays, the file"
    )
    pack.add_argument(
        "--encoding",
        choices=["auto", "pixels", "original", "jpeg"],
        default="auto",
        help="pixels: fastest, images of one size; original: the files' bytes; jpeg: encoded anew; "
        "auto: original if there are files, else pixels",
    )
    pack.add_argument(
        "--size",
        type=whole_number(1),
        help="resize the shorter side to this many pixels; --encoding pixels also cuts the middle square",
    )
    pack.add_argument("--quality", type=whole_number(1, 100), default=95, help="JPEG quality (default: 95)")
    pack.add_argument("--workers", type=whole_number(0), default=0, help="processes that read and encode")
    pack.set_defaults(run=_data_pack)
    info = commands.add_parser("info", help="what a packed file holds, and whether it is undamaged")
    info.add_argument("file", type=path_argument)
    info.set_defaults(run=_data_info)


def _numbers(text: str) -> list[float]:
    return [amount(part) for part in text.split(",")]


def _plan(options: argparse.Namespace) -> None:
    from d2ft_hpc import plan_report
    from d2ft_hpc.config_faults import validated
    from d2ft_hpc.config_file import parse_values
    from d2ft_hpc.plan_config import PlanConfig
    from d2ft_hpc.planning import Budgets, SkipPlan, solve

    if options.scores is None:
        if options.load is None:
            raise PlanError(
                "There is nothing to plan from: name a run with scores, or a saved plan with --load."
            )
        plan = SkipPlan.read(options.load)
        say(plan_report.describe_alone(plan))
    else:
        problem = plan_report.problem_of(
            plan_report.read_scores(options.scores, options.index),
            Budgets(options.compute_budget, options.communication_budget, options.memory_budget),
            ranks=options.ranks,
            stages=options.stages,
            speeds=options.speeds,
            placed=options.placed,
        )
        if options.load is not None:
            plan = plan_report.read_checked(options.load, problem)
        else:
            given = {"planner": options.planner, "options": parse_values(options.options)}
            plan_config = validated(PlanConfig, given, "plan.")
            plan = solve(problem, options.planner, **plan_config.arguments(seed=0))
        say(plan_report.describe(plan, problem))
    if options.diff is not None:
        say(plan_report.describe_difference(SkipPlan.read(options.diff), plan))
    if options.save is not None:
        plan.write(options.save)
    if options.png is not None:
        plan_report.save_heat_map(plan, options.png)


def _data_pack(options: argparse.Namespace) -> None:
    from d2ft_hpc.data.packing import pack_by_name

    pack_by_name(
        options.name,
        options.root,
        options.output,
        encoding=options.encoding,
        size=options.size,
        quality=options.quality,
        workers=options.workers,
    )


def _data_info(options: argparse.Namespace) -> None:
    from d2ft_hpc.data.packed import describe

    say(describe(options.file))


def _train(options: argparse.Namespace) -> int:
    from d2ft_hpc.launch.signals import StopSignals

    further = [
        text for text in options.overrides if text.endswith((".yaml", ".yml")) and not _is_setting(text)
    ]
    files = [options.config, *map(Path, further)]
    if further:
        overrides = [text for text in options.overrides if text not in further]
        return _train_each(files, overrides)
    config = config_of(options)

    def train(control: Control, device: torch.device, launcher: str, watch: Watch) -> int:
        from d2ft_hpc.training.loop import train

        if not train(config, control, device, launcher, watch):
            return UNFINISHED
        if control.rank == 0:
            say(f"results in {config.run_folder / 'results.h5'}")
        return 0

    return on_ranks(config, train, StopSignals(config.launch.stop_signals))


def _is_setting(text: str) -> bool:
    """Whether it is a KEY=VALUE, whose value may end like a file's name, and not a file whose name has a `=`."""
    key, mark, _ = text.partition("=")
    return bool(mark) and "/" not in key and not Path(text).exists()


def _train_each(files: Sequence[Path], overrides: Sequence[str]) -> int:
    """Each configuration in a process of its own, one after the other; 1 if any failed. One that is to be continued is
    the last: its status is returned."""
    from d2ft_hpc.errors import LaunchError
    from d2ft_hpc.launch import detect
    from d2ft_hpc.launch.command_runner import CommandRunner

    if detect().world_size > 1:
        raise LaunchError(f"{len(files)} configurations under one launcher: start each one, or an array job")
    configs = [read_config(file, overrides) for file in files]  # faults show before the first run starts
    runner = CommandRunner([name for config in configs for name in config.launch.stop_signals])
    failed = []
    for index, (file, config) in enumerate(zip(files, configs, strict=True)):
        status = UNFINISHED
        if not runner.stopped:
            say(f"==> {file}")
            command = [sys.executable, "-m", "d2ft_hpc", "train", str(file), *overrides]
            status = runner.run(command, config.launch.stop_signals)
        if status == UNFINISHED:
            left = ", ".join(map(str, files[index:]))
            print_line(f"unfinished: {left}; to go on, start again with train.resume=auto")
            return UNFINISHED
        if status in (130, -signal.SIGINT):
            return status
        if status:
            failed.append(str(file))
    if failed:
        print_line(f"failed: {', '.join(failed)}")
    return int(bool(failed))


def _score(options: argparse.Namespace) -> int:
    config = config_of(options)

    def score(control: Control, device: torch.device, launcher: str, watch: Watch) -> int:
        from d2ft_hpc.training.score import score

        score(options.output, config, control, device, launcher, watch)
        if control.rank == 0:
            say(f"scores in {options.output}")
        return 0

    return on_ranks(config, score)


def _doctor(options: argparse.Namespace) -> int:
    from d2ft_hpc.doctor import examine

    return examine(options.config, options.overrides, json=options.json)


def _models(options: argparse.Namespace) -> int:
    from d2ft_hpc.model.census import census, described

    found = list(census(options.pattern))
    if not found:
        print_line(
            f"timm has no model whose name matches {options.pattern!r}: give a part of it, such as dinov3, or a "
            "pattern, such as 'vit_*dinov3'"
        )
        return 1
    say(described(found))
    return 0


def _report(options: argparse.Namespace) -> None:
    from d2ft_hpc.report import report

    replaced = options.html.exists()
    told = report(
        options.runs,
        page=options.html,
        png=options.png,
        reference=options.reference,
        margin=options.margin,
    )
    say(told)
    say(f"page: {options.html.absolute()}" + (", in place of the one before" if replaced else ""))


if __name__ == "__main__":
    sys.exit(main())
