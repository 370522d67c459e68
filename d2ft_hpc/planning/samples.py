"""Plans by whole samples: how many samples of each replica's batch run, in all blocks and heads.

Which samples those are is decided at each step by their scores (`d2ft_hpc.selection`). Among all plans that skip
something, these kept most of dense training's accuracy on CIFAR-10 (analysis/plan_structure); plans by tokens keep
more on other data (analysis/tokens).
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from pydantic import Field

from d2ft_hpc.errors import PlanError
from d2ft_hpc.planning.plan import Operation, SkipPlan
from d2ft_hpc.planning.planner import Options, Planner


def plan_samples(
    *,
    samples: int,
    slots: int,
    replicas: int,
    num_blocks: int,
    num_heads: int,
    compute_budget: float,
    score_cost: float,
) -> SkipPlan:
    """The most samples that a replica can train on within its compute budget after scoring all of them.

    samples: of one replica's batch; the number that runs is a multiple of `slots`, its micro-batches.
    compute_budget: share of the dense batch's training compute. score_cost: of scoring one sample, in units of its
        training.

    Returns a plan whose rows are samples in the order of the draw, uint8 [sample * replicas, block, head]: the
    first rows of each replica FULL, the others SHORTCUT. It is the optimum: samples cost the same and more is better.

    Raises PlanError, naming the least feasible budget, if not even one sample a micro-batch fits.
    """
    per_slot = int((compute_budget - score_cost) * samples / slots + 1e-9)
    if per_slot < 1:
        least = score_cost + slots / samples
        raise PlanError(
            f"compute_budget={compute_budget:g}: scoring {samples} samples takes {score_cost:.3f} of the dense "
            f"compute and leaves less than one sample for each of {slots} micro-batches; at least {least:.3f}, or "
            f"larger micro-batches, or, for images, a smaller options.image_size"
        )
    trained = min(per_slot * slots, samples)
    operations = np.full((samples, replicas, num_blocks, num_heads), Operation.SHORTCUT, dtype=np.uint8)
    operations[:trained] = Operation.FULL
    return SkipPlan(
        operations.reshape(samples * replicas, num_blocks, num_heads),
        replicas,
        binding="sample",
        planner=SAMPLES.name,
        objective=trained / samples,
        bound=trained / samples,
        gap=0.0,
        status="optimal",
    )


class SampleOptions(Options):
    """A forward pass at a low resolution, or on a quarter of a text's tokens, scores every sample, then some train,
    drawn by score."""

    image_size: int | None = Field(default=None, gt=0)
    """Height and width at which images are scored, pixels, a multiple of the patch size; null: half of
    data.image_size, rounded up to whole patches."""
    score: Literal["error", "loss"] = "error"
    """error: how far the predicted probabilities are from the label (it bounds the gradient's norm); loss: the cross
    entropy."""
    uniform_share: float = Field(default=0.25, ge=0)
    """Multiple of the mean score that every score gets on top, so that easy samples are drawn too."""
    weights: Literal["none", "unbiased"] = "none"
    """unbiased: drawn images are weighted so that the expected gradient is the whole batch's."""


SAMPLES = Planner(
    "samples",
    "whole samples, drawn in each step by a score of their own at a low resolution, or on a part of a text",
    plan_samples,
    SampleOptions,
    reads_scores=False,
    makes_few_shapes=True,
    binding="sample",
)
