"""Makes DEMO_WEIGHTS: `python -m analysis.demo.pretrain [FILE]`, a few minutes on 2 cores.

Trains on scikit-learn's digits 0-4 under random affine maps; the demo's task, digits 5-9, stays unseen. Each
image is turned by a random multiple of 90 degrees and the model must name digit and turn (20 classes).
"""

from __future__ import annotations

import math
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchvision.transforms import v2

from d2ft_hpc.config import DataConfig
from d2ft_hpc.data.datasets import open_split
from d2ft_hpc.data.loader import eval_loader, train_loader
from d2ft_hpc.data.sampler import MicroBatchSampler
from d2ft_hpc.demo.model import DEMO_WEIGHTS, vit_digits_demo

DIGITS = range(5)
TURNS = 4
SEED, EPOCHS, BATCH, PEAK_LR, WEIGHT_DECAY = 0, 60, 16, 5e-4, 0.05
DATA = DataConfig(name="digits", classes=list(DIGITS), micro_batch_size=BATCH, slots=1)


def pretrain(file: Path) -> float:
    """Train from scratch, write the weights without the classifier as fp16, return `accuracy`."""
    torch.manual_seed(SEED)
    model = vit_digits_demo(num_classes=TURNS * len(DIGITS))
    train = open_split(DATA, "train")
    sampler = MicroBatchSampler(len(train), micro_batch_size=BATCH, slots=1, replicas=1, replica=0, seed=SEED)
    batches = train_loader(train, sampler)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LR, weight_decay=WEIGHT_DECAY)
    steps = EPOCHS * sampler.batches_per_epoch
    warm_up = steps // 10
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm_up, (1 + math.cos(math.pi * step / steps)) / 2)
    )
    for epoch in range(EPOCHS):
        sampler.set_epoch(epoch)
        begin, total = time.perf_counter(), 0.0
        for images, labels in batches:
            turns = torch.randint(TURNS, labels.shape)
            loss = cross_entropy(model(turned(moved(images), turns)), labels + len(DIGITS) * turns)
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            total += loss.item()
        seconds = time.perf_counter() - begin
        print(f"epoch {epoch + 1}/{EPOCHS}: loss {total / len(batches):.4f}, {seconds:.1f} s", flush=True)
    top1 = accuracy(model)
    weights = {name: w.half() for name, w in model.state_dict().items() if not name.startswith("head.")}
    about = {
        "made_by": "python -m analysis.demo.pretrain",
        "data": "scikit-learn digits 0-4, training split, random affine maps and quarter turns",
        "task": "digit and quarter turn, 20 classes",
        "recipe": f"AdamW, {EPOCHS} epochs, batch {BATCH}, peak lr {PEAK_LR}, weight decay {WEIGHT_DECAY}",
        "seed": f"{SEED}",
        "top1_upright_digits_0_4_test": f"{top1:.4f}",
        "license": "apache-2.0",
    }
    save_file(weights, file, metadata=about)
    return top1


def moved(images: Tensor) -> Tensor:
    """Each image [3, height, width], -1 to 1, under a random affine map of its own."""
    affine = v2.RandomAffine(15, translate=(0.1, 0.1), scale=(0.8, 1.2), shear=10, fill=-1)
    return torch.stack([affine(image) for image in images])


def turned(images: Tensor, turns: Tensor) -> Tensor:
    """Each image [3, height, width] turned by its number of quarter turns."""
    return torch.stack([image.rot90(int(turn), (1, 2)) for image, turn in zip(images, turns, strict=True)])


@torch.no_grad()
def accuracy(model: nn.Module) -> float:
    """Top-1 among the five digits on their upright held-out images."""
    model.eval()
    test = open_split(DATA, "test")
    hits = 0
    for images, labels in eval_loader(test, batch_size=64):
        hits += int((model(images)[:, : len(DIGITS)].argmax(1) == labels).sum())
    return hits / len(test)


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else DEMO_WEIGHTS
    print(f"top-1 on held-out digits 0-4: {pretrain(target):.4f}; wrote {target}")
