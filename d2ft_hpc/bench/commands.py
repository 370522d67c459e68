"""The subcommands of `d2ft-hpc bench`: their arguments, and what they print. Nothing large is imported before MPI."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from d2ft_hpc.command import add_config, amount, on_ranks, read_config, share, whole_number
from d2ft_hpc.config import load_config
from d2ft_hpc.paths import path_argument

if TYPE_CHECKING:
    import torch

    from d2ft_hpc.launch import Control
    from d2ft_hpc.launch.watch import Watch


def add_benches(benches: Any) -> None:
    """benches: the subparsers to add to."""
    planner = benches.add_parser(
        "planner",
        help="time and quality of every planner on synthetic scores",
        description="Solves one synthetic problem with every planner; needs no GPU and no MPI.",
    )
    planner.add_argument("--blocks", type=whole_number(1), required=True)
    planner.add_argument("--heads", type=whole_number(1), required=True)
    planner.add_argument("--micro-batches", type=whole_number(1), required=True)
    planner.add_argument("--ranks", type=whole_number(1), required=True, help="tensor-parallel ranks")
    planner.add_argument("--stages", type=whole_number(1), default=1, help="pipeline stages")
    planner.add_argument("--heterogeneous", action="store_true", help="ranks of different speeds")
    planner.add_argument("--equal-scores", action="store_true", help="no head is better than another")
    planner.add_argument("--in-order", action="store_true", help="heads stay where timm has them")
    planner.add_argument("--seed", type=whole_number(0), default=0, help="of the scores")
    planner.add_argument("--json", action="store_true", help="end with one line of JSON")
    planner.set_defaults(run=_planner)

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
        engine.add_argument("--image-size", type=whole_number(1), default=64, help="pixels")
        engine.add_argument("--micro-batch-size", type=whole_number(1), default=8, help="samples")
        engine.add_argument(
            "--slots", type=whole_number(1), default=2, help="micro-batches of a replica in a step"
        )
        engine.add_argument("--stage", type=whole_number(1), default=1, choices=range(4), help="of ZeRO")
        engine.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
        engine.add_argument("--steps", type=whole_number(1), default=100, help="measured steps of each")
        engine.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
        engine.add_argument("--json", action="store_true", help="end with one line of JSON")
        if name == "overhead":
            engine.add_argument("--pipeline-stages", type=whole_number(1), default=1)
            engine.add_argument("--tensor-parallel", type=whole_number(1), default=1)
        if name == "speed":
            engine.add_argument("--engine", default="deepspeed", choices=["deepspeed", "ddp", "fsdp2"])
            engine.add_argument("--compile", action="store_true", help="dense and plan through torch.compile")
            engine.add_argument("--cuda-graphs", action="store_true", help="blocks launched as CUDA graphs")
            engine.add_argument("--planner", default="makespan")
            engine.add_argument("--compute-budget", type=share(), default=0.6, help="share of the dense step")
        engine.set_defaults(run=_engine, bench=name)

    recording = benches.add_parser(
        "results",
        help="what recording costs, and how fast its file opens",
        description="Writes, opens, summarises and draws the records of a synthetic run.",
    )
    recording.add_argument("--steps", type=whole_number(1), default=10_000)
    recording.add_argument("--ranks", type=whole_number(1), default=64)
    recording.add_argument("--step-seconds", type=amount, default=0.1, help="how long a step would take")
    recording.add_argument(
        "--folder", type=path_argument, help="where to write (default: the temporary folder)"
    )
    recording.add_argument("--json", action="store_true", help="print the measurements as JSON")
    recording.set_defaults(run=_results)

    images = benches.add_parser(
        "data",
        help="images a second that a configuration's training data delivers",
        description="Reads as one replica of a run does, without a model: compare with what the model consumes.",
    )
    add_config(images)
    images.add_argument("--seconds", type=amount, default=10.0, help="how long to read (default: 10)")
    images.set_defaults(run=_data)
    saves = benches.add_parser(
        "checkpoints",
        help="what saving checkpoints costs the training beside it",
        description="Trains in stretches with and without a save, in turns; start it alone or as the run.",
    )
    add_config(saves)
    saves.add_argument("--steps", type=whole_number(1), default=50, help="of a stretch (default: 50)")
    saves.add_argument(
        "--pairs", type=whole_number(1), default=10, help="stretches with and without (default: 10)"
    )
    saves.add_argument("--json", action="store_true", help="print the measurements as JSON")
    saves.set_defaults(run=_checkpoints)
    scores = benches.add_parser(
        "scores",
        help="what measuring scores costs beside dense training",
        description="Scores a micro-batch of random images, by micro-batch and by sample, between dense passes.",
    )
    add_config(scores)
    scores.add_argument("--repeats", type=whole_number(1), default=10, help="of each (default: 10)")
    scores.set_defaults(run=_scores)

    lora = benches.add_parser(
        "lora",
        help="step time and memory of D2FT-LoRA beside peft's LoRA",
        description="Trains the same adapted model by peft alone and under a plan, in turns. The last line is JSON.",
    )
    lora.add_argument("--model", default="vit_small_patch16_224", help="a timm VisionTransformer's name")
    lora.add_argument("--image-size", type=whole_number(1), default=224, help="pixels")
    lora.add_argument("--micro-batch-size", type=whole_number(1), default=16, help="samples")
    lora.add_argument("--slots", type=whole_number(1), default=5, help="micro-batches in a step")
    lora.add_argument("--rank", type=whole_number(1), default=8)
    lora.add_argument("--layers", default="qkv,proj,fc1,fc2", help="those that are adapted")
    lora.add_argument("--planner", default="joint")
    lora.add_argument("--compute-budget", type=share(), default=0.6, help="share of peft's step")
    lora.add_argument("--steps", type=whole_number(1), default=10, help="measured steps of each")
    lora.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    lora.add_argument("--dtype", default="fp32", choices=["fp32", "bf16"])
    lora.set_defaults(run=_lora)
    step = benches.add_parser(
        "step",
        help="forward and backward of a micro-batch under a plan, against the dense model and the plan's ideal",
        description="Times one micro-batch in one process, dense and under the plan in turn.",
    )
    step.add_argument("--model", default="vit_small_patch16_224", help="a timm VisionTransformer's name")
    step.add_argument("--micro-batch", type=whole_number(1), default=16, help="samples")
    step.add_argument("--compute", type=share(), default=0.6, help="most of the dense FLOPs (default: 0.6)")
    step.add_argument(
        "--forward-only",
        type=share(zero=True),
        default=0.0,
        help="share of heads that run forward only (default: 0)",
    )
    step.add_argument(
        "--plan",
        default="static",
        help="static: as many heads in every block, or one of two numbers, drawn (default); or a saved plan's file",
    )
    step.add_argument(
        "--heads-multiple",
        type=whole_number(1),
        help="numbers of FULL heads are multiples of it (default: 2 on a GPU for more than 8 heads, else 1)",
    )
    step.add_argument(
        "--lora",
        type=whole_number(1),
        help="LoRA of this rank, by peft, of the dense model too (default: none)",
    )
    step.add_argument("--image-size", type=whole_number(1), default=224, help="pixels")
    step.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    step.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"])
    step.add_argument(
        "--repeats",
        type=whole_number(1),
        help="measured steps of each (default: as many of 30 as two minutes allow, at least 5)",
    )
    step.add_argument("--peers", action="store_true", help="also time stochastic depth, drop path and LoRA")
    step.add_argument("--profile", action="store_true", help="where the time of dense and plan goes")
    step.add_argument("--json", action="store_true", help="end with one line of JSON")
    step.set_defaults(run=_step)

    parallel = benches.add_parser(
        "parallel",
        help="step time of pipeline and tensor parallelism under a makespan plan, against dense and the prediction",
        description="Times one engine under a dense and a makespan plan in turn; start it with mpirun -n N.",
    )
    parallel.add_argument("--pipeline-stages", type=whole_number(1), default=1)
    parallel.add_argument("--tensor-parallel", type=whole_number(1), default=1)
    parallel.add_argument("--blocks", type=whole_number(1), default=8)
    parallel.add_argument("--heads", type=whole_number(1), default=4)
    parallel.add_argument("--micro-batches", type=whole_number(1), default=8, help="of each replica")
    parallel.add_argument("--samples", type=whole_number(1), default=8, help="of a micro-batch")
    parallel.add_argument("--compute-budget", type=share(), default=0.6, help="share of the dense step")
    parallel.add_argument("--repeats", type=whole_number(1), default=15, help="steps of each plan")
    parallel.add_argument("--json", action="store_true", help="end with one line of JSON")
    parallel.set_defaults(run=_parallel)
    network = benches.add_parser(
        "network",
        help="bytes on the wire and step time over slow links, under a dense, the paper's and a makespan plan",
        description="Starts its ranks itself, in network namespaces of this machine joined by links of a given rate; "
        "needs root, ip and tc.",
    )
    network.add_argument("--rate", default="100mbit", help="of every link each way (default: 100mbit)")
    network.add_argument("--tp", type=whole_number(1), default=4, help="tensor-parallel ranks (default: 4)")
    network.add_argument("--pp", type=whole_number(1), default=1, help="pipeline stages (default: 1)")
    network.add_argument("--blocks", type=whole_number(1), default=4)
    network.add_argument("--heads", type=whole_number(1), default=8, help="of 32 channels")
    network.add_argument("--micro-batches", type=whole_number(1), default=8)
    network.add_argument("--samples", type=whole_number(1), default=4, help="of a micro-batch")
    network.add_argument("--compute-budget", type=share(), default=0.6, help="share of the dense step")
    network.add_argument("--communication-budget", type=share(), default=0.5, help="share of the dense step")
    network.add_argument("--repeats", type=whole_number(1), default=3, help="steps of each plan (default: 3)")
    network.add_argument("--json", action="store_true", help="end with one line of JSON")
    network.set_defaults(run=_network)
    unequal = benches.add_parser(
        "unequal",
        help="waiting at the meeting point when a busy process shares one rank's core",
        description="Equal shares against shares by watched speeds; start it with mpirun -n 2 on two idle cores.",
    )
    unequal.add_argument("--compute-budget", type=share(), default=0.6, help="share of the dense step")
    unequal.add_argument(
        "--steps", type=whole_number(1), default=10, help="measured steps of each plan (default: 10)"
    )
    unequal.add_argument("--json", action="store_true", help="end with one line of JSON")
    unequal.set_defaults(run=_unequal)


def _planner(options: argparse.Namespace) -> int:
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


def _connected(device: Literal["auto", "cpu", "cuda"]) -> Control:
    """The ranks that a launcher started; ends the command with one line where they do not meet."""
    from d2ft_hpc.launch import connect, detect, run_guarded

    met: list[Control] = []
    status = run_guarded(None, lambda: met.append(connect(detect(), device_type=device)))
    if status:
        raise SystemExit(status)
    return met[0]


def _engine(options: argparse.Namespace) -> int:
    from d2ft_hpc.launch import device_type_of, run_guarded

    control = _connected(options.device)

    def run() -> None:
        import torch

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
            device=torch.device(device_type_of(options.device)),
            pipeline_stages=getattr(options, "pipeline_stages", 1),
            tensor_parallel=getattr(options, "tensor_parallel", 1),
            compile=getattr(options, "compile", False),
            cuda_graphs=getattr(options, "cuda_graphs", False),
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


def _results(options: argparse.Namespace) -> int:
    from d2ft_hpc.bench.results import benchmark, report_text
    from d2ft_hpc.launch import run_guarded

    def run() -> None:
        measured = benchmark(
            steps=options.steps, ranks=options.ranks, step_seconds=options.step_seconds, folder=options.folder
        )
        print(report_text(measured, options.json))

    return run_guarded(None, run)


def _data(options: argparse.Namespace) -> int:
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


def _checkpoints(options: argparse.Namespace) -> int:
    from d2ft_hpc.launch import run_guarded

    def run() -> int:
        config = read_config(options)

        def bench(control: Control, device: torch.device, launcher: str, watch: Watch) -> int:
            from d2ft_hpc.bench.checkpoints import benchmark, report_text

            measured = benchmark(config, control, device, watch, steps=options.steps, pairs=options.pairs)
            if control.rank == 0:
                print(report_text(measured, options.json))
            return 0

        return on_ranks(config, bench)

    return run_guarded(None, run)


def _scores(options: argparse.Namespace) -> int:
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


def _step(options: argparse.Namespace) -> int:
    from d2ft_hpc.launch import device_type_of, run_guarded

    def run() -> None:
        import torch

        from d2ft_hpc.bench.step import Sizes, benchmark, describe

        device = torch.device(device_type_of(options.device))
        of_device = "bfloat16" if device.type == "cuda" else "float32"
        sizes = Sizes(
            model=options.model,
            micro_batch=options.micro_batch,
            compute=options.compute,
            forward_only=options.forward_only,
            heads_multiple=options.heads_multiple,
            lora_rank=options.lora,
            plan=None if options.plan == "static" else Path(options.plan),
            image_size=options.image_size,
            device=device,
            dtype=getattr(torch, of_device if options.dtype == "auto" else options.dtype),
            repeats=options.repeats,
        )
        found = benchmark(sizes, with_peers=options.peers, with_profile=options.profile)
        print(describe(found))
        if options.json:
            print(json.dumps(found))

    return run_guarded(None, run)


def _lora(options: argparse.Namespace) -> int:
    from d2ft_hpc.launch import device_type_of, run_guarded

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
            device=torch.device(device_type_of(options.device)),
            dtype={"fp32": torch.float32, "bf16": torch.bfloat16}[options.dtype],
        )
        print(report(sizes, compare(sizes)))

    return run_guarded(None, run)


def _parallel(options: argparse.Namespace) -> int:
    from d2ft_hpc.launch import run_guarded

    control = _connected("cpu")

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


def _network(options: argparse.Namespace) -> int:
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


def _unequal(options: argparse.Namespace) -> int:
    from d2ft_hpc.launch import run_guarded

    control = _connected("cpu")

    def run() -> None:
        from d2ft_hpc.bench.unequal import benchmark, report

        result = benchmark(control, compute_budget=options.compute_budget, steps=options.steps)
        if control.rank == 0:
            print(report(result, as_json=options.json))

    return run_guarded(control, run)
