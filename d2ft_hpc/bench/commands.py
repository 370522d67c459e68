"""The subcommands of `d2ft-hpc bench`: their arguments, and what they print. Nothing large is imported before MPI."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from d2ft_hpc.command import add_config, amount, share, whole_number
from d2ft_hpc.config import read_config
from d2ft_hpc.planning.tokens import TOKENS

if TYPE_CHECKING:
    from d2ft_hpc.bench.step import Sizes
    from d2ft_hpc.bench.workload import Workload

Settings = TypeVar("Settings", "Sizes", "Workload")


def add_benches(benches: Any) -> None:
    """benches: the subparsers to add to."""
    what = "an engine's step time under a plan over the dense one, beside the plan's promise"
    speed = benches.add_parser(
        "speed",
        help=what,
        description=f"{what}; start it alone or with mpirun, srun, torchrun or deepspeed.",
    )
    add_workload(speed)
    speed.add_argument("--engine", default="deepspeed", choices=["deepspeed", "ddp", "fsdp2"])
    speed.add_argument("--compile", action="store_true", help="dense and plan through torch.compile")
    speed.add_argument("--cuda-graphs", action="store_true", help="blocks launched as CUDA graphs")
    speed.add_argument("--planner", default=TOKENS.name)
    speed.add_argument("--compute-budget", type=share(), default=0.6, help="share of the dense step")
    speed.set_defaults(run=_speed)

    images = benches.add_parser(
        "data",
        help="images a second that a configuration's training data delivers",
        description="Reads as one replica of a run does, without a model: compare with what the model consumes.",
    )
    add_config(images)
    images.add_argument("--seconds", type=amount, default=10.0, help="how long to read (default: 10)")
    images.set_defaults(run=_data)
    step = benches.add_parser(
        "step",
        help="forward and backward of a micro-batch under a plan, against the dense model and the plan's ideal",
        description="Times one micro-batch in one process, dense and under the plan in turn.",
    )
    step.add_argument("--model", default="vit_small_patch16_224", help="the name of a timm model")
    step.add_argument("--micro-batch", type=whole_number(1), default=16, help="samples of a micro-batch")
    step.add_argument("--compute", type=share(), default=0.6, help="most of the dense FLOPs (default: 0.6)")
    step.add_argument(
        "--forward-only",
        type=share(zero=True),
        default=0.0,
        help="share of heads that run forward only (default: 0)",
    )
    step.add_argument(
        "--plan",
        type=lambda text: None if text == "static" else Path(text),
        help="static: as many heads in every block, or one of two numbers, drawn (default); or a saved plan's file",
    )
    step.add_argument(
        "--heads-multiple",
        type=whole_number(1),
        help="numbers of FULL heads are multiples of it (default: 2 on a GPU for more than 8 heads, else 1)",
    )
    step.add_argument(
        "--lora",
        dest="lora_rank",
        type=whole_number(1),
        help="LoRA of this rank, by peft, of the dense model too (default: none)",
    )
    step.add_argument(
        "--image-size", type=whole_number(1), default=224, help="height and width of the images, pixels"
    )
    step.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    step.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"])
    step.add_argument(
        "--repeats",
        type=whole_number(2),
        help="measured steps of each, at least 2 (default: as many of 30 as two minutes allow, at least 5)",
    )
    step.add_argument("--profile", action="store_true", help="where the time of dense and plan goes")
    step.add_argument("--json", action="store_true", help="end with one line of JSON")
    step.set_defaults(run=_step)


def add_workload(parser: argparse.ArgumentParser) -> None:
    """The arguments that `read_workload` reads."""
    parser.add_argument("--model", default="vit_tiny_patch16_224", help="the name of a timm model")
    parser.add_argument(
        "--image-size", type=whole_number(1), default=64, help="height and width of the images, pixels"
    )
    parser.add_argument(
        "--micro-batch-size", type=whole_number(1), default=8, help="samples of a micro-batch"
    )
    parser.add_argument(
        "--slots", type=whole_number(1), default=2, help="micro-batches of a replica in a step"
    )
    parser.add_argument("--stage", type=whole_number(0, 3), default=1, help="ZeRO stage")
    parser.add_argument("--pipeline-stages", type=whole_number(1), default=1, help="of DeepSpeed's engines")
    parser.add_argument(
        "--tensor-parallel",
        type=whole_number(1),
        default=1,
        help="ranks that share each block, under DeepSpeed",
    )
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument(
        "--steps", type=whole_number(2), default=100, help="measured steps of each, at least 2"
    )
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")


def read_workload(options: argparse.Namespace) -> Workload:
    """The settings that a bench's arguments give; the others keep their defaults."""
    import torch

    from d2ft_hpc.bench.workload import Workload
    from d2ft_hpc.launch import device_type_of

    return _settings(Workload, options, device=torch.device(device_type_of(options.device, "--device ")))


def _settings(kind: type[Settings], options: argparse.Namespace, **own: Any) -> Settings:
    """kind: a dataclass, whose fields the options of the same names give; own: those that they do not."""
    given = {name: value for name, value in vars(options).items() if name in kind.__dataclass_fields__}
    return kind(**{**given, **own})


def _speed(options: argparse.Namespace) -> int:
    from d2ft_hpc.launch import connect, detect, run_guarded

    control = connect(detect(), device_type=options.device, device_setting="--device ")

    def run() -> None:
        from d2ft_hpc.bench.speed import speed, speed_report

        result = speed(read_workload(options), control, options.planner, options.compute_budget)
        if control.rank == 0:
            print(speed_report(result))
            if options.json:
                print(json.dumps(result))

    return run_guarded(control, run)


def _data(options: argparse.Namespace) -> None:
    import torch

    from d2ft_hpc.bench.data import benchmark
    from d2ft_hpc.launch import device_type_of

    config = read_config(options.config, options.overrides)
    measured = benchmark(config, torch.device(device_type_of(config.engine.device)), options.seconds)
    print(
        f"{measured['images_per_second']:.0f} images/s of {config.data.image_size} px to {measured['device']} with "
        f"{measured['workers']} workers; first batch after {measured['first_batch_seconds']:.2f} s"
    )


def _step(options: argparse.Namespace) -> None:
    import torch

    from d2ft_hpc.bench.step import Sizes, benchmark, describe
    from d2ft_hpc.launch import device_type_of

    device = torch.device(device_type_of(options.device, "--device "))
    of_device = "bfloat16" if device.type == "cuda" else "float32"
    dtype = getattr(torch, of_device if options.dtype == "auto" else options.dtype)
    sizes = _settings(Sizes, options, device=device, dtype=dtype)
    found = benchmark(sizes, with_profile=options.profile)
    print(describe(found))
    if options.json:
        print(json.dumps(found))
