"""Accuracy, confusion and loss over a test set; always the dense model."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2ft_hpc.launch import Control, gathered


@dataclass(frozen=True)
class Evaluation:
    accuracy: float
    """Share of the samples whose largest logit is the label's."""
    loss: float
    """Mean cross-entropy, nats."""
    samples: int
    seconds: float
    confusion: np.ndarray
    """Samples by label and prediction, int64 [class, class]."""

    @property
    def class_accuracy(self) -> np.ndarray:
        """Share of each class's samples that were right, float64 [class]; NaN where there are none."""
        of_class = self.confusion.sum(axis=1)
        right = np.diagonal(self.confusion)
        return np.asarray(np.divide(right, of_class, out=np.full(len(right), np.nan), where=of_class > 0))


def evaluate(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], control: Control, device: torch.device
) -> Evaluation:
    """Each rank evaluates its own batches; the result is over all of them, the same on every rank."""
    start = time.perf_counter()
    dtype = next(model.parameters()).dtype
    loss_sum = torch.zeros((), dtype=torch.float64, device=device)
    cells, classes = [], 0
    was_training = model.training
    model.eval()
    with torch.inference_mode():
        for images, labels in batches:
            labels = labels.to(device)
            logits = model(images.to(device, dtype)).float()
            classes = logits.shape[-1]
            cells.append(labels * classes + logits.argmax(-1))
            loss_sum += F.cross_entropy(logits, labels, reduction="sum").double()
    model.train(was_training)
    # With many classes, few pairs of label and prediction occur, and only these are sent.
    cell, count = np.unique(torch.cat(cells).cpu().numpy() if cells else [], return_counts=True)
    parts = gathered(control, [classes, cell.tolist(), count.tolist(), float(loss_sum)])
    classes = max(part[0] for part in parts)
    counts = np.zeros(classes * classes, np.int64)
    for _, occurring, times, _ in parts:
        counts[occurring] += np.array(times, np.int64)
    samples = int(counts.sum())
    total_loss = sum(part[3] for part in parts)
    confusion = counts.reshape(classes, classes)
    return Evaluation(
        accuracy=np.trace(confusion) / samples,
        loss=total_loss / samples,
        samples=samples,
        seconds=time.perf_counter() - start,
        confusion=confusion,
    )
