"""Step time of training loops as users write them, without D2FT and with it:

torchrun --nproc_per_node 1 -m analysis.engines.own_loops ddp --json

Each contender is a loop of its own, which runs alone for all of its steps: dense as it is, dense under torch.compile,
and with D2FT, as it is and with what makes kernels and launches faster. Under plans by tokens a step's time depends on
its images' size; the mean is over the whole run, each size by the median of its steps but the first ones, in which
kernels are compiled.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import numpy as np
import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

import d2ft_hpc
from d2ft_hpc.command import share, whole_number
from d2ft_hpc.families.table import family_of

LOOPS = ("plain", "ddp", "fsdp2", "zero0", "zero1", "zero2", "zero3")
WARM_UP = 4
"""Steps of each size of images that are not counted."""

Step = Callable[[Tensor, Tensor], object]


def contenders(options: argparse.Namespace) -> Iterator[tuple[str, bool, dict[str, Any] | None]]:
    """Name, whether the loop compiles its model, and what D2FT is asked for."""
    plan = {
        "compute_budget": options.compute_budget,
        "total_steps": options.steps,
        "planner": options.planner,
    }
    yield "dense", False, None
    yield "dense, torch.compile", True, None
    yield "plan", False, plan
    yield "plan, cuda_graphs", False, {**plan, "cuda_graphs": True}
    yield "plan, compile and cuda_graphs", False, {**plan, "compile": True, "cuda_graphs": True}


def loop(
    options: argparse.Namespace, device: torch.device, is_compiled: bool, plan: dict[str, Any] | None
) -> tuple[Step, Any]:
    """A step of the loop, and what tells its plan."""
    torch.manual_seed(0)
    model = timm.create_model(options.model, img_size=options.image_size, num_classes=10).to(device)
    if options.loop.startswith("zero"):
        return _deepspeed_loop(options, model, is_compiled, plan)
    d2ft = None if plan is None else d2ft_hpc.attach(model, **plan)
    trained: nn.Module = model
    if options.loop == "ddp":
        trained = DistributedDataParallel(model, gradient_as_bucket_view=True)
    elif options.loop == "fsdp2":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        for block in family_of(model).blocks(model):
            if is_compiled:
                block.compile()
            fully_shard(block, mp_policy=policy)
        fully_shard(model, mp_policy=policy)
    if is_compiled and options.loop != "fsdp2":
        trained = torch.compile(trained)  # type: ignore[assignment]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def step(images: Tensor, labels: Tensor) -> None:
        low = nullcontext() if options.loop == "fsdp2" else torch.autocast(device.type, torch.bfloat16)
        with low:
            loss = F.cross_entropy(trained(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step, d2ft


def _deepspeed_loop(
    options: argparse.Namespace, model: nn.Module, is_compiled: bool, plan: dict[str, Any] | None
) -> tuple[Step, Any]:
    import deepspeed

    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": options.samples,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "torch_adam": True}},
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": int(options.loop[-1])},
        "steps_per_print": 10**9,
    }
    if plan is None:
        engine, *_ = deepspeed.initialize(
            model=model, model_parameters=list(model.parameters()), config=config
        )
        if is_compiled:
            engine.compile()
    else:
        engine, *_ = d2ft_hpc.initialize(model=model, config={**config, "d2ft": plan})

    def step(images: Tensor, labels: Tensor) -> None:
        loss = F.cross_entropy(engine(images.bfloat16()).float(), labels)
        engine.backward(loss)
        engine.step()

    return step, getattr(engine, "d2ft", None)


def seconds_of(
    options: argparse.Namespace, device: torch.device, is_compiled: bool, plan: dict[str, Any] | None
) -> dict[str, Any]:
    """Mean seconds of a step over the run, and by the size of images in patches."""
    step, d2ft = loop(options, device, is_compiled, plan)
    generator = torch.Generator().manual_seed(int(os.environ.get("RANK", "0")))
    shape = (options.samples, 3, options.image_size, options.image_size)
    images = torch.randn(shape, generator=generator).to(device)
    labels = torch.randint(0, 10, shape[:1], generator=generator).to(device)
    taken: dict[str, list[float]] = defaultdict(list)
    begin = time.perf_counter()
    step(images, labels)  # with which the first plan comes
    for _ in range(1, options.steps):
        _wait(device)
        start = time.perf_counter()
        grid = None if d2ft is None else d2ft.plan.grid_of(0)
        step(images, labels)
        _wait(device)
        taken["full" if grid is None else f"{grid[0]} x {grid[1]}"].append(time.perf_counter() - start)
    of_size = {size: float(np.median(each[WARM_UP:])) for size, each in taken.items()}
    mean = sum(len(each) * of_size[size] for size, each in taken.items()) / (options.steps - 1)
    return {
        "mean_seconds": mean,
        "of_size": {
            size: {"steps": len(taken[size]), "seconds": seconds} for size, seconds in of_size.items()
        },
        "all_seconds": time.perf_counter() - begin,
    }


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def main() -> int:
    parser = argparse.ArgumentParser(prog="own_loops", description=__doc__)
    parser.add_argument("loop", choices=LOOPS)
    parser.add_argument("--model", default="vit_base_patch16_224")
    parser.add_argument("--image-size", type=whole_number(1), default=224)
    parser.add_argument("--samples", type=whole_number(1), default=128, help="of a rank's batch")
    parser.add_argument("--steps", type=whole_number(1), default=100)
    parser.add_argument("--planner", default="tokens")
    parser.add_argument("--compute-budget", type=share(), default=0.4)
    parser.add_argument("--only", help="names of contenders that contain this")
    parser.add_argument("--json", action="store_true", help="a line of JSON for each contender")
    options = parser.parse_args()
    is_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if is_gpu else torch.device("cpu")
    if is_gpu:
        torch.cuda.set_device(device)
    if options.loop != "plain":
        dist.init_process_group("cpu:gloo,cuda:nccl" if is_gpu else "gloo")
    is_first = os.environ.get("RANK", "0") == "0"
    setting = {
        **{name: value for name, value in vars(options).items() if name not in ("json", "only")},
        "device": torch.cuda.get_device_name(device) if is_gpu else "cpu",
        "ranks": int(os.environ.get("WORLD_SIZE", "1")),
    }
    for name, is_compiled, plan in contenders(options):
        if options.only is not None and options.only not in name:
            continue
        found = seconds_of(options, device, is_compiled, plan)
        gc.collect()
        torch._dynamo.reset()
        if is_first:
            of_size = found["of_size"].items()
            sizes = ", ".join(
                f"{size}: {1e3 * each['seconds']:.1f} x {each['steps']}" for size, each in of_size
            )
            print(f"{options.loop} {name:32s}{1e3 * found['mean_seconds']:8.1f} ms  ({sizes})", flush=True)
        if is_first and options.json:
            print(json.dumps({**setting, "contender": name, **found}), flush=True)
    if dist.is_initialized():
        dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
