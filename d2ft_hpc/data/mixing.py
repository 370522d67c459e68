"""Mixup (arXiv 1710.09412) and CutMix (arXiv 1905.04899) of one micro-batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor
from torchvision.transforms import v2

from d2ft_hpc.data.transforms import seeded


@dataclass(frozen=True)
class Mixing:
    """Mixes each image with its neighbour in the micro-batch. If both kinds are on, one of them is drawn for each
    micro-batch."""

    num_classes: int
    mixup_alpha: float = 0.0
    """Of Beta(alpha, alpha), from which the share of the neighbour is drawn; 0: no mixup."""
    cutmix_alpha: float = 0.0
    """The same for CutMix."""

    def __call__(self, images: Tensor, labels: Tensor, entropy: Sequence[int]) -> tuple[Tensor, Tensor]:
        """images [sample, 3, height, width], labels int64 [sample]; draws are decided by `entropy` alone.

        Returns mixed images and float32 labels [sample, class] that sum to 1; both unchanged if nothing is on.
        """
        methods = []
        if self.mixup_alpha > 0:
            methods.append(v2.MixUp(alpha=self.mixup_alpha, num_classes=self.num_classes))
        if self.cutmix_alpha > 0:
            methods.append(v2.CutMix(alpha=self.cutmix_alpha, num_classes=self.num_classes))
        if not methods:
            return images, labels
        with seeded(entropy):
            images, labels = v2.RandomChoice(methods)(images, labels)
        return images, labels
