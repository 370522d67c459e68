"""From a stored image to what the model sees, in two stages.

1. Sample by sample, on the CPU (`Cut`, `timm_transform`): decoding and whatever needs the image at its own size; the
result is uint8 [3, height, width] of one size. Images stored as pixels skip this stage. 2. A whole batch at once, on
the model's device (`BatchTransform`): resize, crop, flip, normalise. So small images travel to the device as they are
stored.

Each sample's random draws belong to (seed, epoch, sample) alone, in both stages.
"""

from __future__ import annotations

import functools
import inspect
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import create_transform
from torch import Tensor
from torchvision.ops import roi_align
from torchvision.transforms.v2.functional import to_pil_image

from d2ft_hpc.errors import ConfigError

Augmentation = Literal["none", "shift", "resized_crop", "timm"]
"""none: the whole image. shift: the whole image, shifted by up to an eighth, and flips. resized_crop: random crops of
50 to 100 % of the area, and flips. timm: timm.data.create_transform."""

DRAWS = 5
_SHIFT_Y, _SHIFT_X, _FLIP, _AREA, _RATIO = range(DRAWS)
CROPPED_SHARE = 7 / 8
"""Share of the shorter side that evaluation keeps if training uses random crops."""
AREA = (0.5, 1.0)
RATIO = (3 / 4, 4 / 3)

Crop = Literal["whole", "central", "random"]
Entropy = Sequence[int]
"""Decides everything that is drawn for a sample."""

ImageSize = tuple[int, int]
"""(height, width), pixels."""

SampleTransform = Callable[[Tensor, Entropy | None, ImageSize], Tensor]
"""From uint8 0 to 255 or float32 0 to 1, [3, height, width]; without entropy nothing is drawn, as in evaluation. The
size is what the result should have; timm's transforms have one of their own."""


@dataclass(frozen=True)
class Cut:
    """Stage 1 of images of any size: a part of each, in one size."""

    crop: Crop = "whole"

    def __call__(self, image: Tensor, entropy: Entropy | None, size: ImageSize) -> Tensor:
        """image: [3, height, width]. Returns its type, [3, *size]."""
        height, width = image.shape[-2:]
        if self.crop == "central":
            image = _central(image)
        elif self.crop == "random" and entropy is not None:
            left, top, right, bottom = map(round, _box(height, width, uniform_draws(entropy).tolist()))
            image = image[:, top:bottom, left:right]
        # A decoded image has its channels last; a part of it that has, too, is resized twice as fast.
        part = image[None].contiguous(memory_format=torch.channels_last)
        return _in_size(part, size)[0]


@dataclass(frozen=True)
class BatchTransform:
    """Stage 2. Samples do not affect each other: a sample's result depends on its own pixels and draws alone."""

    image_size: int | None
    """Height and width of the result, pixels; None: that of the images."""
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop: Crop = "whole"
    shift: bool = False
    """Shifts images by up to an eighth of their size in both directions; borders are mirrored."""
    flip: bool = False
    """Half of the images, left to right."""

    def __call__(self, images: Tensor, draws: Tensor) -> Tensor:
        """images: uint8 0 to 255 or float32 0 to 1, [sample, 3, height, width]; draws: float32 [sample, DRAWS],
        uniform in [0, 1), on the same device. Returns float32 [sample, 3, height, width]."""
        x = images.float() / 255 if images.dtype == torch.uint8 else images
        x = self._resized(x, draws)
        if self.shift or self.flip:
            x = self._moved(x, draws)
        mean, std = _on_device(self.mean, x.device), _on_device(self.std, x.device)
        return (x - mean) / std

    def _resized(self, x: Tensor, draws: Tensor) -> Tensor:
        if self.image_size is None:
            return x
        height, width = x.shape[-2:]
        size = (self.image_size, self.image_size)
        if self.crop == "random":
            boxes = torch.stack(_box(height, width, draws.unbind(1), torch.clamp_max), dim=1)
            cut: Tensor = roi_align(x, list(boxes.unsqueeze(1)), size, aligned=True)
            return cut
        return _in_size(_central(x) if self.crop == "central" else x, size)

    def _moved(self, x: Tensor, draws: Tensor) -> Tensor:
        rows, columns = (
            self._places(size, draws[:, draw, None])
            for size, draw in zip(x.shape[-2:], (_SHIFT_Y, _SHIFT_X), strict=True)
        )
        if self.flip:
            columns = torch.where(draws[:, _FLIP, None] < 0.5, columns.flip(1), columns)
        samples, channels = torch.arange(len(x), device=x.device), torch.arange(3, device=x.device)
        return x[
            samples[:, None, None, None],
            channels[None, :, None, None],
            rows[:, None, :, None],
            columns[:, None, None, :],
        ]

    def _places(self, size: int, draws: Tensor) -> Tensor:
        """Of each sample and pixel along one direction, the pixel that comes there, int64 [sample, size]; draws:
        [sample, 1]."""
        far = size // 8 if self.shift else 0
        shifts = torch.floor(draws * (2 * far + 1)).long() - far
        places = torch.arange(size, device=draws.device) + shifts
        # Beyond the border they are mirrored; its pixel is not repeated.
        return (size - 1) - ((size - 1) - places.abs()).abs()


@functools.cache
def _on_device(channels: tuple[float, ...], device: torch.device) -> Tensor:
    """The values as float32 [channel, 1, 1]; made once, because copying to a GPU makes the program wait."""
    return torch.tensor(channels, device=device).view(-1, 1, 1)


def _central(x: Tensor) -> Tensor:
    """The middle of images [..., height, width]: a square of CROPPED_SHARE of the shorter side."""
    height, width = x.shape[-2:]
    side = max(round(min(height, width) * CROPPED_SHARE), 1)
    top, left = (height - side) // 2, (width - side) // 2
    return x[..., top : top + side, left : left + side]


def _in_size(x: Tensor, size: ImageSize) -> Tensor:
    """Images [sample, 3, height, width] as [sample, 3, *size]."""
    if x.shape[-2:] == size:
        return x
    return F.interpolate(x, size, mode="bilinear", antialias=True)


def _box(
    height: int, width: int, draws: Sequence[Any], at_most: Callable[[Any, int], Any] = min
) -> list[Any]:
    """A random box (left, top, right, bottom) in pixels: area and aspect ratio as in AREA and RATIO, sides cut to the
    image's. draws: floats [DRAWS], or tensors with the draws of many samples, which `at_most` can compare."""
    area = (AREA[0] + (AREA[1] - AREA[0]) * draws[_AREA]) * (height * width)
    ratio = RATIO[0] * (RATIO[1] / RATIO[0]) ** draws[_RATIO]
    box_width = at_most((area * ratio) ** 0.5, width)
    box_height = at_most((area / ratio) ** 0.5, height)
    left, top = draws[_SHIFT_X] * (width - box_width), draws[_SHIFT_Y] * (height - box_height)
    return [left, top, left + box_width, top + box_height]


def timm_transform(
    image_size: int, mean: tuple[float, ...], std: tuple[float, ...], options: Mapping[str, Any]
) -> SampleTransform:
    """Stage 1 as timm trains: float32 of image_size, normalised. options: of timm.data.create_transform. Raises
    ConfigError if it does not know one."""
    known = set(inspect.signature(create_transform).parameters)
    ours = {"input_size", "is_training", "mean", "std"}
    wrong = sorted(set(options) - known | set(options) & ours)
    if wrong:
        raise ConfigError(
            f"data.timm.{wrong[0]}={options[wrong[0]]!r}: not an option to set; timm.data.create_transform has "
            f"{', '.join(sorted(known - ours))}"
        )
    try:
        of_picture = create_transform(image_size, is_training=True, mean=mean, std=std, **options)
        of_picture(Image.new("RGB", (8, 8)))
    except Exception as error:  # timm raises many kinds, some at first use
        raise ConfigError(f"data.timm={dict(options)}: not accepted by timm: {error}") from error
    return _Timm(of_picture)


@dataclass(frozen=True)
class _Timm:
    """timm's transforms of a picture, in the size that they were made for."""

    of_picture: Callable[[Image.Image], Tensor]

    def __call__(self, image: Tensor, entropy: Entropy | None, size: ImageSize) -> Tensor:
        with seeded(entropy or [0]):
            return self.of_picture(to_pil_image(image))


def uniform_draws(entropy: Entropy) -> np.ndarray:
    """float32 [DRAWS] in [0, 1), decided by `entropy` alone."""
    # 24 bits: what float32 can hold below 1.
    words = np.random.SeedSequence(entropy).generate_state(DRAWS) >> 8
    draws: np.ndarray = words.astype(np.float32) / np.float32(2**24)
    return draws


@contextmanager
def seeded(entropy: Entropy) -> Iterator[None]:
    """Seeds Python's, numpy's and torch's (CPU) generators from `entropy`; afterwards they are as before."""
    words = np.random.SeedSequence(entropy).generate_state(3, np.uint64)
    of_python, of_numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        # torch.manual_seed would also reseed the accelerators, which fork_rng does not give back here.
        torch.default_generator.manual_seed(int(words[0]))
        random.seed(int(words[1]))
        np.random.seed(int(words[2]) & 0xFFFFFFFF)
        try:
            yield
        finally:
            random.setstate(of_python)
            np.random.set_state(of_numpy)
