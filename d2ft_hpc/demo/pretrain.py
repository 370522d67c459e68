"""Makes DEMO_WEIGHTS: `python -m d2ft_hpc.demo.pretrain [FILE]`, a few minutes on 2 cores.

Trains on scikit-learn's digits 0-4 under random affine maps. Digits 5-9, the demo's task, stay unseen.
"""

from __future__ import annotations

import math
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn.functional import cross_entropy

from d2ft_hpc.data.datasets import load
from d2ft_hpc.data.loader import eval_loader, train_loader
from d2ft_hpc.data.sampler import MicroBatchSampler
from d2ft_hpc.demo.model import DEMO_WEIGHTS, vit_digits_demo

CLASSES = range(5)
SEED, EPOCHS, BATCH, PEAK_LR, WEIGHT_DECAY = 0, 40, 32, 1e-3, 0.05


def pretrain(file: Path) -> float:
    """Train from scratch, write the weights without the classifier as fp16, return top-1 on the test split."""
    torch.manual_seed(SEED)
    model = vit_digits_demo(num_classes=len(CLASSES))
    train = load("digits", image_size=32, split="train", classes=CLASSES, augment=True)
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
            loss = cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            total += loss.item()
        print(
            f"epoch {epoch + 1}/{EPOCHS}: loss {total / len(batches):.4f}, {time.perf_counter() - begin:.1f} s"
        )
    top1 = accuracy(model)
    weights = {name: w.half() for name, w in model.state_dict().items() if not name.startswith("head.")}
    about = {
        "made_by": "python -m d2ft_hpc.demo.pretrain",
        "data": "scikit-learn digits 0-4, training split, random affine maps",
        "recipe": f"AdamW, {EPOCHS} epochs, batch {BATCH}, peak lr {PEAK_LR}, weight decay {WEIGHT_DECAY}, seed {SEED}",
        "top1_digits_0_4_test": f"{top1:.4f}",
        "license": "apache-2.0",
    }
    save_file(weights, file, metadata=about)
    return top1


@torch.no_grad()
def accuracy(model: nn.Module) -> float:
    """Top-1 on the held-out images of the pretraining classes."""
    model.eval()
    test = load("digits", image_size=32, split="test", classes=CLASSES)
    hits = sum(
        int((model(images).argmax(1) == labels).sum()) for images, labels in eval_loader(test, batch_size=64)
    )
    return hits / len(test)


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else DEMO_WEIGHTS
    print(f"top-1 on held-out digits 0-4: {pretrain(target):.4f}; wrote {target}")
