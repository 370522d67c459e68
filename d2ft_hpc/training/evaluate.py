"""Top-1 accuracy and loss over a test set; always the dense model."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2ft_hpc.launch import Control


@dataclass(frozen=True)
class Evaluation:
    accuracy: float
    """Share of the samples whose largest logit is the label's."""
    loss: float
    """Mean cross-entropy, nats."""
    samples: int
    seconds: float


def evaluate(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], control: Control, device: torch.device
) -> Evaluation:
    """Each rank evaluates its own batches; the result is over all of them, the same on every rank."""
    start = time.perf_counter()
    dtype = next(model.parameters()).dtype
    sums = torch.zeros(3, dtype=torch.float64, device=device)
    was_training = model.training
    model.eval()
    with torch.inference_mode():
        for images, labels in batches:
            labels = labels.to(device)
            logits = model(images.to(device, dtype)).float()
            correct = (logits.argmax(-1) == labels).sum()
            loss = F.cross_entropy(logits, labels, reduction="sum")
            sums += torch.stack(
                [correct.double(), loss.double(), torch.tensor(float(len(labels))).to(loss).double()]
            )
    model.train(was_training)
    gathered = control.all_gather(sums.cpu().numpy().tobytes())
    correct_sum, loss_sum, samples = np.sum([np.frombuffer(part) for part in gathered], axis=0)
    return Evaluation(correct_sum / samples, loss_sum / samples, int(samples), time.perf_counter() - start)
