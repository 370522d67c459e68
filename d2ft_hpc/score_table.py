"""All contribution scores: what a subnet gives to a micro-batch, as a sum over its weights. To add one, name it here.

Needs no torch, so that a configuration is checked without; `d2ft_hpc.scores` measures.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Score:
    name: str
    about: str
    """What is summed, for users, who choose by it."""
    of_weight: Callable[[Tensor, Tensor], Tensor]
    """What each weight adds: takes gradients float32 [..., *shape] and weights [*shape]."""
    reads_gradients: bool = True
    """Whether it reads gradients; else it is the same for all micro-batches, and `of_weight` gets the weights in
    place of gradients."""
    in_steps: bool = False
    """Whether it can be taken from the gradients that training steps form anyway (`scores.gradient_observer`)."""


FISHER = Score(
    "fisher", "g^2 (the paper's for the forward)", lambda gradient, weight: gradient.square(), in_steps=True
)
GRADIENT_MAGNITUDE = Score("gradient_magnitude", "|g|", lambda gradient, weight: gradient.abs())
TAYLOR = Score("taylor", "|w g|", lambda gradient, weight: (gradient * weight.detach().float()).abs())
WEIGHT_MAGNITUDE = Score(
    "weight_magnitude",
    "|w| (the paper's for the backward)",
    lambda gradient, weight: weight.float().abs(),
    reads_gradients=False,
)

SCORES: dict[str, Score] = {
    score.name: score for score in (FISHER, GRADIENT_MAGNITUDE, TAYLOR, WEIGHT_MAGNITUDE)
}
"""By name, in the order in which messages list them."""
