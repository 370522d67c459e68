"""Parts of a training set: a validation split held out of it, and a fraction of the rest; stratified and seeded."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from d2ft_hpc.errors import DataError

Indices = npt.NDArray[np.int64]


def hold_out(labels: Indices, fraction: float, seed: int) -> tuple[Indices, Indices]:
    """Sorted indices of the rest and of the held-out `fraction`; each class is divided in that proportion.

    Raises ValueError if a class would be missing in either.
    """
    everything = np.arange(len(labels))
    if fraction == 0:
        return everything, everything[:0]
    from sklearn.model_selection import train_test_split

    rest, held_out = train_test_split(everything, test_size=fraction, stratify=labels, random_state=seed)
    return np.sort(rest), np.sort(held_out)


def training_and_validation(
    labels: Indices, *, train_fraction: float, validation_fraction: float, seed: int
) -> tuple[Indices, Indices]:
    """Sorted indices of the images to train on and of those to validate on.

    The validation images do not depend on `train_fraction`, which is a share of what they leave.
    Raises DataError if a class would be missing in either.
    """
    key, fraction, images = "validation_fraction", validation_fraction, len(labels)
    try:
        rest, validation = hold_out(labels, validation_fraction, seed)
        if train_fraction < 1:
            key, fraction, images = "train_fraction", train_fraction, len(rest)
            _, chosen = hold_out(labels[rest], train_fraction, seed)
            rest = rest[chosen]
    except ValueError as error:
        raise DataError(
            f"data.{key}={fraction:g}: a fraction {fraction:g} of {images} images cannot keep every class "
            f"in both parts; choose another"
        ) from error
    return rest, validation
