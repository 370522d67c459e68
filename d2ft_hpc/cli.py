"""The command `d2ft-hpc`."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from d2ft_hpc import __version__
from d2ft_hpc.config import RunConfig, load_config
from d2ft_hpc.errors import ConfigError, PlanError

if TYPE_CHECKING:
    import torch

    from d2ft_hpc.launch import Control
    from d2ft_hpc.launch.signals import StopSignals
    from d2ft_hpc.launch.watch import Watch
    from d2ft_hpc.planning import SkipPlan


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one subcommand and returns the exit status.

    0 done, 1 fault, 2 wrong usage, 75 stopped and to be continued, 130 interrupted.
    """
    options = _parser().parse_args(arguments)
    return int(options.run(options))


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
    train.add_argument("config", type=Path, help="YAML file")
    train.add_argument(
        "overrides",
        nargs="*",
        metavar="KEY=VALUE",
        help="settings that replace the file's; or further YAML files",
    )
    train.set_defaults(run=_train)

    doctor = commands.add_parser(
        "doctor",
        help="check what a run needs before it waits in a queue; start it as the run",
        description="Checks launcher, network, GPUs, file system, data, weights and time limit. Status 1: a run "
        "would fail.",
    )
    doctor.add_argument("config", type=Path, help="YAML file")
    doctor.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings that replace the file's")
    doctor.add_argument("--json", action="store_true", help="print one line of JSON")
    doctor.set_defaults(run=_doctor)

    score = commands.add_parser(
        "score",
        help="measure scores without training; start it as the run",
        description="Measures what a run would measure before its first step; `d2ft-hpc plan` reads the file.",
    )
    score.add_argument("output", type=Path, help="the file to write, such as scores.h5")
    score.add_argument("config", type=Path, help="YAML file")
    score.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings that replace the file's")
    score.set_defaults(run=_score)

    report = commands.add_parser("report", help="compare finished or running runs in a table and on a page")
    report.add_argument(
        "runs", nargs="+", type=Path, help="run folders or results files; the first is the baseline"
    )
    report.add_argument(
        "--html", type=Path, default=Path("report.html"), help="page to write (default: report.html)"
    )
    report.add_argument("--png", type=Path, help="also write a picture of compute and time")
    report.set_defaults(run=_report)

    plan = commands.add_parser(
        "plan",
        help="plan from saved scores, or look at a saved plan; needs no GPU and no MPI",
        description="Prints each device's share of the work, the predicted step time and the gap to the optimum.",
    )
    plan.add_argument(
        "scores",
        type=Path,
        nargs="?",
        help="run folder or results file with scores; not needed to look at a saved plan",
    )
    plan.add_argument("--index", type=int, default=-1, help="which of the file's scores (default: the last)")
    plan.add_argument("--planner", default="makespan", help="paper, joint, makespan, static, depth, ...")
    plan.add_argument("--load", type=Path, metavar="PLAN", help="look at this plan instead of solving one")
    plan.add_argument(
        "--coverage", type=int, default=0, help="least FULL micro-batches of every head in a batch"
    )
    plan.add_argument(
        "--most-shortcut", type=float, default=1.0, help="most of a block's heads that may not run"
    )
    plan.add_argument("--ranks", type=int, default=1, help="tensor-parallel ranks")
    plan.add_argument("--stages", type=int, default=1, help="pipeline stages")
    plan.add_argument("--speeds", type=_numbers, metavar="A,B,...", help="relative speed of each rank")
    plan.add_argument("--placed", action="store_true", help="place the heads on the ranks by their scores")
    plan.add_argument("--compute-budget", type=float, default=0.6, help="share of the dense step")
    plan.add_argument("--communication-budget", type=float, help="share of the dense step")
    plan.add_argument("--memory-budget", type=float, help="share of the activations of a dense row")
    plan.add_argument("--save", type=Path, metavar="PLAN", help="where to save the plan")
    plan.add_argument("--diff", type=Path, metavar="PLAN", help="count what changes from this plan")
    plan.add_argument("--png", type=Path, help="where to write a heat map")
    plan.set_defaults(run=_plan)

    bench = commands.add_parser("bench", help="measure the package's own parts")
    benches = bench.add_subparsers(required=True, metavar="WHAT")
    planner = benches.add_parser(
        "planner",
        help="time and quality of every planner on synthetic scores",
        description="Solves one synthetic problem with every planner; needs no GPU and no MPI.",
    )
    planner.add_argument("--blocks", type=int, required=True)
    planner.add_argument("--heads", type=int, required=True)
    planner.add_argument("--micro-batches", type=int, required=True)
    planner.add_argument("--ranks", type=int, required=True, help="tensor-parallel ranks")
    planner.add_argument("--stages", type=int, default=1, help="pipeline stages")
    planner.add_argument("--heterogeneous", action="store_true", help="ranks of different speeds")
    planner.add_argument("--equal-scores", action="store_true", help="no head is better than another")
    planner.add_argument("--in-order", action="store_true", help="heads stay where timm has them")
    planner.add_argument("--seed", type=int, default=0, help="of the scores")
    planner.add_argument("--json", action="store_true", help="end with one line of JSON")
    planner.set_defaults(run=_bench_planner)

    for name, what in (
        ("overhead", "DeepSpeed's step time with an all-FULL plan over that without us"),
        ("speed", "an engine's step time under a plan over the dense one, beside the plan's promise"),
    ):
        engine = benches.add_parser(
            name,
            help=what,
            description=f"{what}; start it alone or with mpirun, srun, torchrun or deepspeed.",
        )
        engine.add_argument("--model", default="vit_tiny_patch16_224", help="a timm VisionTransformer's name")
        engine.add_argument("--image-size", type=int, default=64, help="pixels")
        engine.add_argument("--micro-batch-size", type=int, default=8, help="samples")
        engine.add_argument("--slots", type=int, default=2, help="micro-batches of a replica in a step")
        engine.add_argument("--stage", type=int, default=1, choices=range(4), help="of ZeRO")
        engine.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
        engine.add_argument("--steps", type=int, default=100, help="measured steps of each")
        engine.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
        engine.add_argument("--json", action="store_true", help="end with one line of JSON")
        if name == "overhead":
            engine.add_argument("--pipeline-stages", type=int, default=1)
            engine.add_argument("--tensor-parallel", type=int, default=1)
        if name == "speed":
            engine.add_argument("--engine", default="deepspeed", choices=["deepspeed", "ddp", "fsdp2"])
            engine.add_argument("--planner", default="makespan")
            engine.add_argument("--compute-budget", type=float, default=0.6, help="share of the dense step")
        engine.set_defaults(run=_bench_engine, bench=name)

    recording = benches.add_parser(
        "results",
        help="what recording costs, and how fast its file opens",
        description="Writes, opens, summarises and draws the records of a synthetic run.",
    )
    recording.add_argument("--steps", type=int, default=10_000)
    recording.add_argument("--ranks", type=int, default=64)
    recording.add_argument("--step-seconds", type=float, default=0.1, help="how long a step would take")
    recording.add_argument("--folder", type=Path, help="where to write (default: the temporary folder)")
    recording.add_argument("--json", action="store_true", help="print the measurements as JSON")
    recording.set_defaults(run=_bench_results)

    images = benches.add_parser(
        "data",
        help="images a second that a configuration's training data delivers",
        description="Reads as one replica of a run does, without a model: compare with what the model consumes.",
    )
    images.add_argument("config", type=Path, help="YAML file")
    images.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings that replace the file's")
    images.add_argument("--seconds", type=float, default=10.0, help="how long to read (default: 10)")
    images.set_defaults(run=_bench_data)
    saves = benches.add_parser(
        "checkpoints",
        help="what saving checkpoints costs the training beside it",
        description="Trains in stretches with and without a save, in turns; start it alone or as the run.",
    )
    saves.add_argument("config", type=Path, help="YAML file")
    saves.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings that replace the file's")
    saves.add_argument("--steps", type=int, default=50, help="of a stretch (default: 50)")
    saves.add_argument("--pairs", type=int, default=10, help="stretches with and without (default: 10)")
    saves.add_argument("--json", action="store_true", help="print the measurements as JSON")
    saves.set_defaults(run=_bench_checkpoints)
    scores = benches.add_parser(
        "scores",
        help="what measuring scores costs beside dense training",
        description="Scores a micro-batch of random images, by micro-batch and by sample, between dense passes.",
    )
    scores.add_argument("config", type=Path, help="YAML file")
    scores.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings that replace the file's")
    scores.add_argument("--repeats", type=int, default=10, help="of each (default: 10)")
    scores.set_defaults(run=_bench_scores)

    lora = benches.add_parser(
        "lora",
        help="step time and memory of D2FT-LoRA beside peft's LoRA",
        description="Trains the same adapted model by peft alone and under a plan, in turns. The last line is JSON.",
    )
    lora.add_argument("--model", default="vit_small_patch16_224", help="a timm VisionTransformer's name")
    lora.add_argument("--image-size", type=int, default=224, help="pixels")
    lora.add_argument("--micro-batch-size", type=int, default=16, help="samples")
    lora.add_argument("--slots", type=int, default=5, help="micro-batches in a step")
    lora.add_argument("--rank", type=int, default=8)
    lora.add_argument("--layers", default="qkv,proj,fc1,fc2", help="those that are adapted")
    lora.add_argument("--planner", default="joint")
    lora.add_argument("--compute-budget", type=float, default=0.6, help="share of peft's step")
    lora.add_argument("--steps", type=int, default=10, help="measured steps of each")
    lora.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    lora.add_argument("--dtype", default="fp32", choices=["fp32", "bf16"])
    lora.set_defaults(run=_bench_lora)
    step = benches.add_parser(
        "step",
        help="forward and backward of a micro-batch under a plan, against the dense model and the plan's ideal",
        description="Times one micro-batch in one process, dense and under the plan in turn.",
    )
    step.add_argument("--model", default="vit_small_patch16_224", help="a timm VisionTransformer's name")
    step.add_argument("--micro-batch", type=int, default=16, help="samples")
    step.add_argument("--compute", type=float, default=0.6, help="most of the dense FLOPs (default: 0.6)")
    step.add_argument(
        "--forward-only", type=float, default=0.0, help="share of heads that run forward only (default: 0)"
    )
    step.add_argument(
        "--plan",
        default="static",
        help="static: as many heads in every block, drawn (default); or a saved plan's file",
    )
    step.add_argument("--image-size", type=int, default=224, help="pixels")
    step.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    step.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"])
    step.add_argument(
        "--repeats",
        type=int,
        default=30,
        help="measured steps of each (default: 30); at least 5, where all take longer than two minutes",
    )
    step.add_argument("--peers", action="store_true", help="also time stochastic depth, drop path and LoRA")
    step.add_argument("--profile", action="store_true", help="where the time of dense and plan goes")
    step.add_argument("--json", action="store_true", help="end with one line of JSON")
    step.set_defaults(run=_bench_step)

    data = commands.add_parser("data", help="pack a data set into one file, or look at a packed one")
    _add_data_commands(data)
    parallel = benches.add_parser(
        "parallel",
        help="step time of pipeline and tensor parallelism under a makespan plan, against dense and the prediction",
        description="Times one engine under a dense and a makespan plan in turn; start it with mpirun -n N.",
    )
    parallel.add_argument("--pipeline-stages", type=int, default=1)
    parallel.add_argument("--tensor-parallel", type=int, default=1)
    parallel.add_argument("--blocks", type=int, default=8)
    parallel.add_argument("--heads", type=int, default=4)
    parallel.add_argument("--micro-batches", type=int, default=8, help="of each replica")
    parallel.add_argument("--samples", type=int, default=8, help="of a micro-batch")
    parallel.add_argument("--compute-budget", type=float, default=0.6, help="share of the dense step")
    parallel.add_argument("--repeats", type=int, default=15, help="steps of each plan")
    parallel.add_argument("--json", action="store_true", help="end with one line of JSON")
    parallel.set_defaults(run=_bench_parallel)
    network = benches.add_parser(
        "network",
        help="bytes on the wire and step time over slow links, under a dense, the paper's and a makespan plan",
        description="Starts its ranks itself, in network namespaces of this machine joined by links of a given rate; "
        "needs root, ip and tc.",
    )
    network.add_argument("--rate", default="100mbit", help="of every link each way (default: 100mbit)")
    network.add_argument("--tp", type=int, default=4, help="tensor-parallel ranks (default: 4)")
    network.add_argument("--pp", type=int, default=1, help="pipeline stages (default: 1)")
    network.add_argument("--blocks", type=int, default=4)
    network.add_argument("--heads", type=int, default=8, help="of 32 channels")
    network.add_argument("--micro-batches", type=int, default=8)
    network.add_argument("--samples", type=int, default=4, help="of a micro-batch")
    network.add_argument("--compute-budget", type=float, default=0.6, help="share of the dense step")
    network.add_argument("--communication-budget", type=float, default=0.5, help="share of the dense step")
    network.add_argument("--repeats", type=int, default=3, help="steps of each plan (default: 3)")
    network.add_argument("--json", action="store_true", help="end with one line of JSON")
    network.set_defaults(run=_bench_network)
    unequal = benches.add_parser(
        "unequal",
        help="waiting at the meeting point when a busy process shares one rank's core",
        description="Equal shares against shares by watched speeds; start it with mpirun -n 2 on two idle cores.",
    )
    unequal.add_argument("--compute-budget", type=float, default=0.6, help="share of the dense step")
    unequal.add_argument("--steps", type=int, default=10, help="measured steps of each plan (default: 10)")
    unequal.add_argument("--json", action="store_true", help="end with one line of JSON")
    unequal.set_defaults(run=_bench_unequal)
    return parser


def _add_data_commands(data: argparse.ArgumentParser) -> None:
    commands = data.add_subparsers(required=True, metavar="WHAT")
    pack = commands.add_parser(
        "pack",
        help="put a data set into one HDF5 file, which data.name=packed data.root=FILE reads",
        description="Parallel file systems are slow with many small files: pack them once.",
    )
    pack.add_argument(
        "name", choices=["cifar10", "cifar100", "stanford_cars", "image_folder", "arrays"],
        help="the data set as data.name; arrays: an .npz or HDF5 file of your own",
    )  # fmt: skip
    pack.add_argument("output", type=Path, help="the file to make")
    pack.add_argument("--root", type=Path, required=True, help="its folder as data.root; of arrays the file")
    pack.add_argument(
        "--encoding",
        choices=["auto", "pixels", "original", "jpeg"],
        default="auto",
        help="pixels: fastest, images of one size; original: the files' bytes; jpeg: encoded anew; "
        "auto: original if there are files, else pixels",
    )
    pack.add_argument("--size", type=int, help="resize the shorter side to this many pixels")
    pack.add_argument("--quality", type=int, default=95, help="of jpeg (default: 95)")
    pack.add_argument("--workers", type=int, default=0, help="processes that read and encode")
    pack.set_defaults(run=_data_pack)
    info = commands.add_parser("info", help="what a packed file holds, and whether it is undamaged")
    info.add_argument("file", type=Path)
    info.set_defaults(run=_data_info)


def _numbers(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


def _plan(options: argparse.Namespace) -> int:
    from d2ft_hpc.launch import run_guarded

    def run() -> None:
        from d2ft_hpc import plan_report
        from d2ft_hpc.planning import SkipPlan, solve

        if options.scores is None:
            if options.load is None:
                raise PlanError(
                    "There is nothing to plan from: name a run with scores, or a saved plan with --load."
                )
            plan = SkipPlan.load(options.load)
            print(plan_report.describe_alone(plan))
            finish(plan)
            return
        problem = plan_report.pose(
            plan_report.read_scores(options.scores, options.index),
            ranks=options.ranks,
            stages=options.stages,
            speeds=options.speeds,
            placed=options.placed,
            compute_budget=options.compute_budget,
            communication_budget=options.communication_budget,
            memory_budget=options.memory_budget,
        )
        if options.load is not None:
            plan = plan_report.load_checked(options.load, problem)
        else:
            plan = solve(problem, options.planner, **planner_options())
        print(plan_report.describe(plan, problem))
        finish(plan)

    def planner_options() -> dict[str, object]:
        """Options that were given; a planner that does not know one refuses it."""
        given: dict[str, object] = {"seed": 0} if options.planner == "random" else {}
        if options.coverage:
            given["coverage"] = options.coverage
        if options.most_shortcut < 1:
            given["most_shortcut"] = options.most_shortcut
        return given

    def finish(plan: SkipPlan) -> None:
        from d2ft_hpc import plan_report
        from d2ft_hpc.planning import SkipPlan

        if options.diff is not None:
            print(plan_report.describe_difference(SkipPlan.load(options.diff), plan))
        if options.save is not None:
            plan.save(options.save)
        if options.png is not None:
            plan_report.save_heat_map(plan, options.png)

    return run_guarded(None, run)


def _bench_planner(options: argparse.Namespace) -> int:
    from d2ft_hpc.bench.planner import benchmark, report
    from d2ft_hpc.launch import run_guarded

    def run() -> None:
        results = benchmark(
            blocks=options.blocks,
            heads=options.heads,
            micro_batches=options.micro_batches,
            ranks=options.ranks,
            stages=options.stages,
            heterogeneous=options.heterogeneous,
            equal_scores=options.equal_scores,
            placed=not options.in_order,
            seed=options.seed,
        )
        print(report(results, as_json=options.json))

    return run_guarded(None, run)


def _bench_engine(options: argparse.Namespace) -> int:
    import torch

    from d2ft_hpc.launch import connect, detect, run_guarded

    device = options.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    control = connect(detect(), device_type=device)

    def run() -> None:
        from d2ft_hpc.bench.engine import Workload, overhead, overhead_report, speed, speed_report

        workload = Workload(
            model=options.model,
            image_size=options.image_size,
            micro_batch_size=options.micro_batch_size,
            slots=options.slots,
            engine=getattr(options, "engine", "deepspeed"),
            stage=options.stage,
            precision=options.precision,
            steps=options.steps,
            device=torch.device(device),
            pipeline_stages=getattr(options, "pipeline_stages", 1),
            tensor_parallel=getattr(options, "tensor_parallel", 1),
        )
        if options.bench == "overhead":
            result = overhead(workload, control)
            told = overhead_report(result)
        else:
            result = speed(workload, control, options.planner, options.compute_budget)
            told = speed_report(result)
        if control.rank == 0:
            print(told)
            if options.json:
                print(json.dumps(result))

    return run_guarded(control, run)


def _bench_results(options: argparse.Namespace) -> int:
    from d2ft_hpc.bench.results import benchmark, report_text
    from d2ft_hpc.launch import run_guarded

    def run() -> None:
        measured = benchmark(
            steps=options.steps, ranks=options.ranks, step_seconds=options.step_seconds, folder=options.folder
        )
        print(report_text(measured, options.json))

    return run_guarded(None, run)


def _bench_data(options: argparse.Namespace) -> int:
    from d2ft_hpc.launch import device_type_of, run_guarded

    def run() -> None:
        import torch

        from d2ft_hpc.bench.data import benchmark

        config = load_config(options.config, options.overrides)
        measured = benchmark(config, torch.device(device_type_of(config.engine.device)), options.seconds)
        print(
            f"{measured['images_per_second']:.0f} images/s of {config.data.image_size} px to {measured['device']} with "
            f"{measured['workers']} workers; first batch after {measured['first_batch_seconds']:.2f} s"
        )

    return run_guarded(None, run)


def _bench_checkpoints(options: argparse.Namespace) -> int:
    from d2ft_hpc.launch import run_guarded

    def run() -> int:
        config = _read_config(options)

        def bench(control: Control, device: torch.device, launcher: str, watch: Watch) -> int:
            from d2ft_hpc.bench.checkpoints import benchmark, report_text

            measured = benchmark(config, control, device, watch, steps=options.steps, pairs=options.pairs)
            if control.rank == 0:
                print(report_text(measured, options.json))
            return 0

        return _watched(config, bench)

    return run_guarded(None, run)


def _bench_scores(options: argparse.Namespace) -> int:
    from d2ft_hpc.launch import device_type_of, run_guarded

    def run() -> None:
        import torch

        from d2ft_hpc.bench.scores import benchmark

        config = load_config(options.config, options.overrides)
        measured = benchmark(config, torch.device(device_type_of(config.engine.device)), options.repeats)
        for granularity, (seconds, flops) in measured.items():
            each = granularity.replace("_", "-")
            print(
                f"Fisher by {each}: {seconds:.2f} of the time and {flops:.2f} of the FLOPs of dense training"
            )

    return run_guarded(None, run)


def _bench_step(options: argparse.Namespace) -> int:
    from d2ft_hpc.launch import run_guarded

    def run() -> None:
        import json

        import torch

        from d2ft_hpc.bench.step import Sizes, benchmark, describe

        cuda = options.device == "cuda" or (options.device == "auto" and torch.cuda.is_available())
        dtype = ("bfloat16" if cuda else "float32") if options.dtype == "auto" else options.dtype
        sizes = Sizes(
            model=options.model,
            micro_batch=options.micro_batch,
            compute=options.compute,
            forward_only=options.forward_only,
            plan=None if options.plan == "static" else Path(options.plan),
            image_size=options.image_size,
            device=torch.device("cuda" if cuda else "cpu"),
            dtype=getattr(torch, dtype),
            repeats=options.repeats,
        )
        found = benchmark(sizes, with_peers=options.peers, with_profile=options.profile)
        print(describe(found))
        if options.json:
            print(json.dumps(found))

    return run_guarded(None, run)


def _data_pack(options: argparse.Namespace) -> int:
    from d2ft_hpc.launch import run_guarded

    def run() -> None:
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

    return run_guarded(None, run)


def _data_info(options: argparse.Namespace) -> int:
    from d2ft_hpc.launch import run_guarded

    def run() -> None:
        from d2ft_hpc.data.packed import describe

        print(describe(options.file))

    return run_guarded(None, run)


def _bench_lora(options: argparse.Namespace) -> int:
    from d2ft_hpc.launch import run_guarded

    def run() -> None:
        import torch

        from d2ft_hpc.bench.lora import Sizes, compare, report

        sizes = Sizes(
            model=options.model,
            image_size=options.image_size,
            micro_batch_size=options.micro_batch_size,
            slots=options.slots,
            rank=options.rank,
            layers=tuple(options.layers.split(",")),
            planner=options.planner,
            compute_budget=options.compute_budget,
            steps=options.steps,
            device=torch.device(options.device),
            dtype={"fp32": torch.float32, "bf16": torch.bfloat16}[options.dtype],
        )
        print(report(sizes, compare(sizes)))

    return run_guarded(None, run)


def _bench_parallel(options: argparse.Namespace) -> int:
    from d2ft_hpc.launch import connect, detect, run_guarded

    control = connect(detect(), device_type="cpu")

    def run() -> None:
        from d2ft_hpc.bench.parallel import Sizes, benchmark, report

        result = benchmark(
            control,
            stages=options.pipeline_stages,
            tensor_ranks=options.tensor_parallel,
            sizes=Sizes(options.blocks, options.heads, options.micro_batches, options.samples),
            compute_budget=options.compute_budget,
            repeats=options.repeats,
        )
        if control.rank == 0:
            print(report(result, as_json=options.json))

    return run_guarded(control, run)


def _bench_network(options: argparse.Namespace) -> int:
    from d2ft_hpc.bench.network import benchmark, report
    from d2ft_hpc.launch import run_guarded

    def run() -> None:
        result = benchmark(
            rate=options.rate,
            stages=options.pp,
            tensor_ranks=options.tp,
            sizes={
                "blocks": options.blocks,
                "heads": options.heads,
                "micro_batches": options.micro_batches,
                "samples": options.samples,
                "head_size": 32,
            },
            compute_budget=options.compute_budget,
            communication_budget=options.communication_budget,
            repeats=options.repeats,
        )
        print(report(result, as_json=options.json))

    return run_guarded(None, run)


def _bench_unequal(options: argparse.Namespace) -> int:
    from d2ft_hpc.launch import connect, detect, run_guarded

    control = connect(detect(), device_type="cpu")

    def run() -> None:
        from d2ft_hpc.bench.unequal import benchmark, report

        result = benchmark(control, compute_budget=options.compute_budget, steps=options.steps)
        if control.rank == 0:
            print(report(result, as_json=options.json))

    return run_guarded(control, run)


def _train(options: argparse.Namespace) -> int:
    from d2ft_hpc.launch import run_guarded

    files = [options.config, *(Path(text) for text in options.overrides if text.endswith((".yaml", ".yml")))]
    if len(files) > 1:
        overrides = [text for text in options.overrides if not text.endswith((".yaml", ".yml"))]
        return run_guarded(None, lambda: _train_each(files, overrides))

    def run() -> int:
        from d2ft_hpc.launch.signals import StopSignals

        config = _read_config(options)
        return _train_connected(config, StopSignals(config.launch.stop_signals))

    return run_guarded(None, run)


def _train_each(files: Sequence[Path], overrides: Sequence[str]) -> int:
    """Each configuration in a process of its own, one after the other; 1 if any failed."""
    import subprocess

    from d2ft_hpc.errors import LaunchError
    from d2ft_hpc.launch import detect

    if detect().world_size > 1:
        raise LaunchError(f"{len(files)} configurations under one launcher: start each one, or an array job")
    for file in files:
        load_config(file, overrides)  # faults show before the first run starts
    failed = []
    for file in files:
        print(f"==> {file}", flush=True)
        status = subprocess.run([sys.executable, "-m", "d2ft_hpc", "train", str(file), *overrides]).returncode
        if status == 130:
            return status
        if status:
            failed.append(str(file))
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return int(bool(failed))


def _read_config(options: argparse.Namespace) -> RunConfig:
    from d2ft_hpc.launch.agree import AgreedError

    try:
        return load_config(options.config, options.overrides)
    except ConfigError as error:
        raise error from AgreedError()  # every rank reads the same configuration


def _train_connected(config: RunConfig, signals: StopSignals) -> int:
    def train(control: Control, device: torch.device, launcher: str, watch: Watch) -> int:
        from d2ft_hpc.launch.watch import UNFINISHED
        from d2ft_hpc.training.loop import train

        if not train(config, control, device, launcher, watch):
            return UNFINISHED
        if control.rank == 0:
            print(f"results in {config.run_folder / 'results.h5'}")
        return 0

    return _watched(config, train, signals)


def _score(options: argparse.Namespace) -> int:
    from d2ft_hpc.launch import run_guarded

    def run() -> int:
        config = _read_config(options)

        def score(control: Control, device: torch.device, launcher: str, watch: Watch) -> int:
            from d2ft_hpc.training.score import score

            score(options.output, config, control, device, launcher, watch)
            if control.rank == 0:
                print(f"scores in {options.output}")
            return 0

        return _watched(config, score)

    return run_guarded(None, run)


def _watched(
    config: RunConfig,
    function: Callable[[Control, torch.device, str, Watch], int],
    signals: StopSignals | None = None,
) -> int:
    """Runs `function` on all ranks that the launcher started, watching each other, and returns the exit status."""
    from d2ft_hpc.launch import connect, detect, device_type_of, run_guarded

    environment = detect()
    asked = config.engine.device
    control = connect(environment, device_type=asked, timeout_seconds=config.launch.timeout_seconds)

    import torch  # large: after the ranks have met

    from d2ft_hpc.launch.watch import Watch

    device = torch.device(device_type_of(asked))

    def run() -> int:
        with Watch(
            control,
            silence_seconds=config.launch.silence_seconds,
            stall_seconds=config.launch.stall_seconds,
            run_folder=config.run_folder,
            signals=signals,
        ) as watch:
            status = run_guarded(
                control,
                lambda: function(control, device, environment.launcher, watch),
                run_folder=config.run_folder,
                before_abort=watch.fail,
            )
        if control.world_size > 1:
            # Nobody watches the interpreter's own end any more, which takes a while: a rank that hung in it would
            # keep the launcher, and so the job, waiting.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
        return status

    return run_guarded(control, run, run_folder=config.run_folder)


def _doctor(options: argparse.Namespace) -> int:
    from d2ft_hpc.doctor import examine
    from d2ft_hpc.launch import run_guarded

    return run_guarded(None, lambda: examine(options.config, options.overrides, json=options.json))


def _report(options: argparse.Namespace) -> int:
    from d2ft_hpc.launch import run_guarded
    from d2ft_hpc.report import report

    def run() -> None:
        print(report(options.runs, page=options.html, png=options.png))
        print(f"page: {options.html}")

    return run_guarded(None, run)


if __name__ == "__main__":
    sys.exit(main())
