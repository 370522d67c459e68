"""Images at the resolution that a plan's row asks for, scaled by the model that gets them in training."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2ft_hpc.errors import PlanError
from d2ft_hpc.execution.copies import set_outside_copies
from d2ft_hpc.families.family import BlockFamily
from d2ft_hpc.planning.plan import Grid, SkipPlan


def scaled(images: Tensor, size: tuple[int, int]) -> Tensor:
    """images: [sample, channel, height, width]; returns them as [sample, channel, *size] in their own type.

    Bilinear, over all pixels that a new one covers (antialiasing).
    """
    if tuple(images.shape[-2:]) == size:
        return images
    # A CPU has no such kernel for half precision.
    return F.interpolate(images.float(), size, mode="bilinear", antialias=True).to(images.dtype)


class ImageScaling:
    """Scales the images of one model's micro-batches."""

    def __init__(self, family: BlockFamily, grid: Callable[[], Grid | None]) -> None:
        """grid: of the micro-batch that runs; None: its images stay as they are."""
        self._family, self.grid = family, grid
        self.size: tuple[int, int] | None = None
        """Height and width of the images that a plan may scale; None: of any."""
        self.may_come_scaled = False
        """Whether images may have the resolution already that a row asks for, as those of a loader that knows it."""
        self._is_scaled = False  # the module that embeds the images gets them scaled already
        self._model: Callable[[], Any] = lambda: None

    @property
    def model(self) -> Any:
        """The model, or the part of one, whose images are scaled; None without one."""
        return self._model()

    @property
    def patch_size(self) -> Grid | None:
        """Height and width of the pixels that become one token; None where there is no model."""
        return None if self.model is None else self._family.patch_size(self.model)

    def link(self, model: nn.Module) -> None:
        """Lets a model, or the part of one that gets the images, scale them in training."""
        embedding = self._family.embedding(model)
        if embedding is None:
            return
        self._model = weakref.ref(model)
        own: dict[str, Any] = {
            "_d2ft": _Link(self, self._model),
            "forward": MethodType(_scaling_forward, embedding),
        }
        if hasattr(type(embedding), "dynamic_feat_size"):  # not peft's wrapper
            own["dynamic_feat_size"] = MethodType(_scaled_grid, embedding)
        set_outside_copies(embedding, own)

    def take_any_size(self, plan: SkipPlan) -> None:
        """For a plan with grids. Raises PlanError where the blocks cannot be run on images of other sizes."""
        if not self._family.takes_images:
            raise PlanError("the plan scales images, and the model reads text: solve a plan by heads")
        if plan.binding == "sample":
            raise PlanError("the plan scales images and draws samples: only one of them can be")
        if self.model is not None:
            self._family.take_any_size(self.model)

    def scaled(self, images: Tensor) -> Tensor:
        """A micro-batch's images [sample, channel, height, width] at the resolution that its row asks for. Raises
        PlanError if they are not images of full size.
        """
        if self._is_scaled:
            return images
        return scaled(images, self.scaled_size((images.shape[-2], images.shape[-1])))

    def scaled_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """Height and width that images of this size get. Raises PlanError as `scaled`."""
        grid = self.grid()
        if grid is None:
            return size
        patch_size = self.patch_size
        assert patch_size is not None
        wanted = grid[0] * patch_size[0], grid[1] * patch_size[1]
        if self.may_come_scaled and size == wanted:
            return size
        if self.size not in (None, size):
            raise PlanError(
                f"the model was made for images of {self.size[0]} x {self.size[1]} pixels and gets "
                f"{size[0]} x {size[1]}, which the plan would scale to that size or less: make the model with "
                f"img_size={size}, or use a planner that leaves images as they are"
            )
        return wanted

    @contextmanager
    def scaled_before(self, images: Tensor) -> Iterator[Tensor]:
        """Yields the scaled images. Inside, nothing is scaled or looked up again, so that code compiled there fits
        all micro-batches."""
        images, self._is_scaled = self.scaled(images), True
        try:
            yield images
        finally:
            self._is_scaled = False


class _Link:
    """What the module that embeds images keeps: what scales them, and the model, or part of one, that it belongs to."""

    def __init__(self, images: ImageScaling, model: weakref.ref[nn.Module]) -> None:
        self.images, self._model = images, model

    @property
    def trains(self) -> bool:
        """Whether the model trains: an evaluation may lack `model.eval()`, but takes no gradient. The embedding may be
        frozen and left in evaluation mode."""
        model = self._model()
        return model is not None and model.training and torch.is_grad_enabled()


def _scaling_forward(embedding: nn.Module, *args: Any, **kwargs: Any) -> Any:
    link: _Link = cast(Any, embedding)._d2ft
    if link.trains and args:
        args = (link.images.scaled(args[0]), *args[1:])
    elif link.trains:
        kwargs["pixel_values"] = link.images.scaled(kwargs["pixel_values"])
    return type(embedding).forward(embedding, *args, **kwargs)


def _scaled_grid(embedding: Any, size: tuple[int, int]) -> tuple[int, int]:
    """Patches of images of this size, by which timm arranges blocks' outputs as a map (`forward_intermediates`)."""
    link: _Link = embedding._d2ft
    size = link.images.scaled_size(size) if link.trains else size
    grid: tuple[int, int] = type(embedding).dynamic_feat_size(embedding, size)
    return grid
