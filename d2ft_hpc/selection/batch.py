"""A micro-batch that samples are drawn from: images and labels, or text by name, as transformers' collators give it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from d2ft_hpc.engines.engine import MicroBatch
from d2ft_hpc.errors import PlanError

Text = Mapping[str, Tensor]
"""`labels`, int64 [sequence, token], -100 where no token is to be learnt, beside all that the model takes by name, each
[sequence, token, ...]."""

Batch = MicroBatch | Text
Kind = TypeVar("Kind", bound=Batch)


def batches_of(given: Sequence[Any], *, are_images: bool) -> list[Batch]:
    """Micro-batches as a loop gives them: pairs of images or input_ids and labels, or texts by name.

    Raises PlanError where it cannot be told what belongs to which sample.
    """
    for each in given:
        if not isinstance(each, Mapping) and not (isinstance(each, list | tuple) and len(each) == 2):
            raise PlanError(f"choose() takes samples and their labels; given was {_told(each)} alone")
    if are_images:
        if any(isinstance(each, Mapping) for each in given):
            raise PlanError(
                "choose() takes images and their labels as two tensors; only text is given by name"
            )
        for images, labels in given:
            _require_classes(images, labels)
        return [(images, labels) for images, labels in given]
    texts = [each if isinstance(each, Mapping) else _text(*each) for each in given]
    for text in texts:
        _require_labels(text)
    first, *others = (_shapes(text) for text in texts)
    for other in others:
        if other != first:
            raise PlanError(
                f"choose() draws from all micro-batches of a batch together, but one has sequences of {first}, another "
                f"of {other}: pad all to the same length"
            )
    return [*texts]


def as_given(chosen: Sequence[Batch], given: Sequence[Any]) -> list[Any]:
    """Pairs where pairs were given."""
    return [
        each if isinstance(before, Mapping) else tensors_of(each)
        for each, before in zip(chosen, given, strict=True)
    ]


def blank(shape: tuple[int, ...], device: torch.device) -> Batch:
    """One sample of zeros. shape: (channel, height, width) of an image, (token,) of a text."""
    if len(shape) == 1:
        ids = torch.zeros(1, *shape, device=device, dtype=torch.long)
        return _text(ids, ids)
    return torch.zeros(1, *shape, device=device), torch.zeros(1, device=device, dtype=torch.long)


def samples_of(batch: Batch) -> Tensor:
    """By which samples and their sizes are counted."""
    return batch["labels"] if isinstance(batch, Mapping) else batch[0]


def tensors_of(batch: Batch) -> tuple[Tensor, ...]:
    return tuple(batch.values()) if isinstance(batch, Mapping) else batch


def like(batch: Kind, tensors: Sequence[Tensor]) -> Kind:
    """These tensors, by the names that those of `batch` have."""
    alike: Any = dict(zip(batch, tensors, strict=True)) if isinstance(batch, Mapping) else tuple(tensors)
    return alike  # type: ignore[no-any-return]


def _text(input_ids: Tensor, labels: Tensor) -> Text:
    return {"input_ids": input_ids, "labels": labels}


def _require_classes(images: Any, labels: Any) -> None:
    are_classes = isinstance(labels, Tensor) and labels.dim() in (1, 2)
    are_classes = are_classes and labels.is_floating_point() == (labels.dim() == 2)
    if not are_classes or labels.shape[0] != len(images):
        raise PlanError(
            f"choose() scores images by their classes, int64 [{len(images)}], or probabilities [{len(images)}, class]; "
            f"labels are {_told(labels)}: planner 'tokens' trains for any loss"
        )


def _require_labels(text: Text) -> None:
    labels = text.get("labels")
    if not isinstance(labels, Tensor) or labels.dim() != 2:
        raise PlanError(
            f"choose() scores sequences by labels of their tokens, [sequence, token]; 'labels' is {_told(labels)}"
        )
    for name, value in text.items():
        if not isinstance(value, Tensor) or value.shape[:2] != labels.shape:
            raise PlanError(
                f"choose() draws from what is [sequence, token], here {[*labels.shape]}; {name!r} is {_told(value)}: "
                f"leave it out, and give it to the model yourself"
            )


def _told(value: Any) -> str:
    if value is None:
        return "missing"
    return f"a tensor of shape {[*value.shape]}" if isinstance(value, Tensor) else f"a {type(value).__name__}"


def _shapes(text: Text) -> str:
    return ", ".join(f"{name} {[*value.shape[1:]]}" for name, value in text.items())
