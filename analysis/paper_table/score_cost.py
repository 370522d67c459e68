"""What measuring scores costs beside a dense training step:

python -m analysis.paper_table.score_cost configs/paper/d2ft_joint.yaml
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from statistics import median

import torch

from d2ft_hpc.command import add_config, whole_number
from d2ft_hpc.config import RunConfig, read_config
from d2ft_hpc.launch import device_type_of, run_guarded
from d2ft_hpc.metering import meter
from d2ft_hpc.model.build import build_model
from d2ft_hpc.model.subnets import SubnetMap
from d2ft_hpc.scores import gradient_scores

CLASSES = 10


def benchmark(config: RunConfig, device: torch.device, repeats: int) -> tuple[float, float]:
    """Fisher scores of one micro-batch of random images beside its dense training.

    Returns seconds and FLOPs, both in units of forward and backward of the dense model with all parameters trained.
    Seconds are the median of the ratios of passes that ran one after the other.
    """
    torch.manual_seed(0)
    size, samples = config.data.image_size, config.data.micro_batch_size
    model = build_model(config.model.name, num_classes=CLASSES, options=config.model.options).to(device)
    subnets = SubnetMap.of(model)
    images = torch.randn(samples, 3, size, size, device=device)
    labels = torch.randint(CLASSES, (samples,), device=device)
    autocast_dtype = torch.bfloat16 if config.engine.precision == "bf16" else None

    def loss_function(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(logits.float(), targets)

    def train() -> None:
        with torch.autocast(device.type, autocast_dtype, enabled=autocast_dtype is not None):
            loss = loss_function(model(images), labels)
        torch.autograd.backward(loss)
        model.zero_grad()

    def score() -> None:
        gradient_scores(model, subnets, images, labels, loss_function, ("fisher",), autocast_dtype)

    def seconds(run: Callable[[], None]) -> float:
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    def flops(run: Callable[[], None]) -> int:
        with meter() as metered:
            run()
        return metered.flops

    triples = [(seconds(train), seconds(score), seconds(train)) for _ in range(repeats + 1)]
    ratios = [2 * own / (before + after) for before, own, after in triples[1:]]
    return median(ratios), flops(score) / flops(train)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="score_cost",
        description="Scores a micro-batch of random images between dense passes.",
    )
    add_config(parser)
    parser.add_argument("--repeats", type=whole_number(1), default=10, help="of each (default: 10)")
    options = parser.parse_args()

    def run() -> None:
        config = read_config(options.config, options.overrides)
        device = torch.device(device_type_of(config.engine.device))
        seconds, flops = benchmark(config, device, options.repeats)
        print(f"Fisher scores: {seconds:.2f} of the time and {flops:.2f} of the FLOPs of dense training")

    return run_guarded(None, run)


if __name__ == "__main__":
    sys.exit(main())
