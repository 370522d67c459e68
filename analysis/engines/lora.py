"""Step time and memory of D2FT-LoRA beside peft's LoRA: `python -m analysis.engines.lora`.

Both train the same adapted model with the same optimiser in one process; their steps alternate.

The ideal. Let a block's products cost f FLOPs forward. With all weights trained, the backward pass forms the
gradients of inputs (f) and of weights (f): FULL costs 3 f, FORWARD_ONLY a third of that. LoRA freezes the weights, so
the backward forms the gradients of inputs and of two thin factors of rank r alone: FULL costs (2 + 3 e) f, where e f,
with e = r (1 / inputs + 1 / outputs) of a layer, is what the factors cost forward, and FORWARD_ONLY (1 + e) f. So
FORWARD_ONLY costs about a half, and a plan of FULL and FORWARD_ONLY saves less than without LoRA: with shares p and
q of the subnets FULL and FORWARD_ONLY, and a share a of the dense step that always runs, the ideal step takes
a + (1 - a) (p + c q) of the dense one, c = (1 + e) / (2 + 3 e). Printed from counted FLOPs, as everywhere, attention's
products included, and in time: with a measured, as the step in which every subnet is SHORTCUT.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from d2ft_hpc.bench.turns import Ratio, alternate
from d2ft_hpc.command import share, whole_number
from d2ft_hpc.execution.attach import attach
from d2ft_hpc.launch import device_type_of, run_guarded
from d2ft_hpc.metering import StepCosts, measure_costs, memory
from d2ft_hpc.model.build import build_model
from d2ft_hpc.model.lora import add_lora
from d2ft_hpc.planning import Budgets, Operation, SkipPlan, pose, solve


@dataclass(frozen=True)
class Sizes:
    model: str
    image_size: int
    micro_batch_size: int
    slots: int
    rank: int
    layers: tuple[str, ...]
    planner: str
    compute_budget: float
    steps: int
    """Measured steps of each."""
    device: torch.device
    dtype: torch.dtype


@dataclass(frozen=True)
class Comparison:
    """Ratios are to peft's step; memory in bytes."""

    peft_step_seconds: float
    plan_step: Ratio
    full_plan_step: Ratio
    """All subnets FULL."""
    forward_only_share: float
    """What FORWARD_ONLY costs of FULL: c of the module's docstring, by counted FLOPs."""
    ideal_flops: float
    ideal_time: float
    efficiency: float
    """ideal_time over the measured ratio: 1 where the clock follows the plan."""
    peft_memory_bytes: float
    plan_memory_bytes: float
    """GPU: most that a step allocates beside what was there before. CPU: most that a micro-batch keeps for its
    backward pass."""
    shares: dict[str, float]
    """Of subnets, by operation."""


def compare(sizes: Sizes) -> Comparison:
    """Raises ConfigError if peft is not installed."""
    peft, ours = _Training(sizes), _Training(sizes)
    executor = attach(ours.model)
    costs = measure_costs(ours.model, executor, (3, sizes.image_size, sizes.image_size))
    plans = _plans(sizes, costs, executor.subnets.shape)
    ours.micro_batch = executor.micro_batch

    def under(plan: SkipPlan) -> Callable[[], None]:
        def run() -> None:
            if executor.plan is not plan:
                executor.activate(plan, 0)
            ours.step()

        return run

    steps = {"peft": peft.step, **{name: under(plan) for name, plan in plans.items()}}
    seconds = alternate(steps, sizes.steps, sizes.device)
    ratio = Ratio.of(seconds["plan"], seconds["peft"])
    always = float(np.median(seconds["nothing"] / seconds["peft"]))
    plan = plans["plan"]
    of_subnets = float(
        (costs.planned_flops(plan.operations).mean() - costs.always_flops)
        / (costs.dense_flops - costs.always_flops)
    )
    ideal_time = always + (1 - always) * of_subnets
    executor.activate(plan, 0)
    return Comparison(
        peft_step_seconds=float(np.median(seconds["peft"])),
        plan_step=ratio,
        full_plan_step=Ratio.of(seconds["full"], seconds["peft"]),
        forward_only_share=costs.forward_share,
        ideal_flops=costs.planned_share(plan),
        ideal_time=ideal_time,
        efficiency=ideal_time / ratio.median,
        peft_memory_bytes=peft.memory_bytes(),
        plan_memory_bytes=ours.memory_bytes(),
        shares={operation.name: share for operation, share in plan.shares().items()},
    )


def report(sizes: Sizes, found: Comparison) -> str:
    mb = 1e-6
    about = (
        f"{sizes.model}, {sizes.image_size} px, {sizes.slots} micro-batches of {sizes.micro_batch_size}, "
        f"LoRA of rank {sizes.rank} on {', '.join(sizes.layers)}, {str(sizes.dtype).removeprefix('torch.')}, "
        f"{sizes.device.type}, {sizes.steps} steps of each in turns"
    )
    shares = ", ".join(f"{share:.0%} {name}" for name, share in found.shares.items())
    lines = [
        about,
        f"peft's step                 {1e3 * found.peft_step_seconds:9.2f} ms, "
        f"{mb * found.peft_memory_bytes:.1f} MB",
        f"all FULL over that          {found.full_plan_step}",
        f"plan ({sizes.planner}, {sizes.compute_budget:.0%}: {shares}) over that  "
        f"{found.plan_step}, {mb * found.plan_memory_bytes:.1f} MB",
        f"FORWARD_ONLY costs {found.forward_only_share:.3f} of FULL, because frozen weights need no gradients",
        f"ideal by FLOPs              {found.ideal_flops:.4f}",
        f"ideal by time               {found.ideal_time:.4f}, efficiency {found.efficiency:.3f}",
    ]
    values = {
        **asdict(sizes),
        "device": sizes.device.type,
        "dtype": str(sizes.dtype).removeprefix("torch."),
        **asdict(found),
    }
    return "\n".join([*lines, json.dumps(values)])


def _plans(sizes: Sizes, costs: StepCosts, subnets: tuple[int, int]) -> dict[str, SkipPlan]:
    """The plan for random scores, and those in which every subnet does the same."""
    shape = (sizes.slots, *subnets)
    scores = np.random.default_rng(0).random((2, *shape))
    problem = pose(scores, costs, Budgets(sizes.compute_budget))
    return {
        "plan": solve(problem, sizes.planner),
        "full": SkipPlan.dense(sizes.slots, 1, *subnets),
        "nothing": SkipPlan(np.full(shape, Operation.SHORTCUT, dtype=np.uint8), 1),
    }


class _Training:
    """peft's LoRA in a plain loop; ours with an executor's `micro_batch`."""

    def __init__(self, sizes: Sizes) -> None:
        torch.manual_seed(0)
        options = {"img_size": sizes.image_size}
        model = build_model(sizes.model, num_classes=_CLASSES, options=options)
        add_lora(model, rank=sizes.rank, alpha=2 * sizes.rank, dropout=0.0, layers=sizes.layers)
        self.model = model.to(sizes.device, sizes.dtype).train()
        self.micro_batch: Callable[[int], AbstractContextManager[None]] = lambda slot: nullcontext()
        self._optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
        generator = torch.Generator().manual_seed(0)
        shape = (sizes.slots, sizes.micro_batch_size, 3, sizes.image_size, sizes.image_size)
        self._images = torch.randn(shape, generator=generator).to(sizes.device, sizes.dtype)
        self._labels = torch.randint(_CLASSES, shape[:2], generator=generator).to(sizes.device)

    def step(self) -> None:
        for slot in range(len(self._images)):
            with self.micro_batch(slot):
                torch.autograd.backward(self._loss(slot) / len(self._images))
        self._optimizer.step()
        self._optimizer.zero_grad()

    def memory_bytes(self) -> float:
        """See `Comparison`."""
        if self._images.device.type == "cuda":
            memory.reset_peak(self._images.device)
            before = torch.cuda.memory_allocated(self._images.device)
            self.step()
            return memory.used_bytes(self._images.device) - before
        return float(max(self._kept_bytes(slot) for slot in range(len(self._images))))

    def _kept_bytes(self, slot: int) -> int:
        """What the forward pass of a micro-batch keeps for its backward, parameters apart."""
        with self.micro_batch(slot):
            return memory.kept_bytes(lambda: self._loss(slot), self.model.parameters())

    def _loss(self, slot: int) -> Tensor:
        return F.cross_entropy(self.model(self._images[slot]).float(), self._labels[slot])


_CLASSES = 10


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="lora",
        description="Trains the same adapted model by peft alone and under a plan, in turns. The last line is JSON.",
    )
    parser.add_argument("--model", default="vit_small_patch16_224", help="a timm VisionTransformer's name")
    parser.add_argument("--image-size", type=whole_number(1), default=224, help="pixels")
    parser.add_argument("--micro-batch-size", type=whole_number(1), default=16, help="samples")
    parser.add_argument("--slots", type=whole_number(1), default=5, help="micro-batches in a step")
    parser.add_argument("--rank", type=whole_number(1), default=8)
    parser.add_argument("--layers", default="qkv,proj,fc1,fc2", help="those that are adapted")
    parser.add_argument("--planner", default="joint")
    parser.add_argument("--compute-budget", type=share(), default=0.6, help="share of peft's step")
    parser.add_argument("--steps", type=whole_number(1), default=10, help="measured steps of each")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="fp32", choices=["fp32", "bf16"])
    options = vars(parser.parse_args())
    options["layers"] = tuple(options["layers"].split(","))
    options["dtype"] = {"fp32": torch.float32, "bf16": torch.bfloat16}[options["dtype"]]

    def run() -> None:
        sizes = Sizes(**options | {"device": torch.device(device_type_of(options["device"]))})
        print(report(sizes, compare(sizes)))

    return run_guarded(None, run)


if __name__ == "__main__":
    sys.exit(main())
