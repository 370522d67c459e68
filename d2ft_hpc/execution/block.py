"""One transformer block under a plan: FULL, FORWARD_ONLY and SHORTCUT heads (arXiv 2504.12471, section 3).

A block is a sequence of residual branches, each a sum over heads, which its family describes (`families.Branch`). For
input x, FULL heads F, FORWARD_ONLY heads O and sg = stop-gradient, each branch makes of x

    x' = x + end(sum_{h in F} B_h(norm x) + sg(sum_{h in O} B_h(norm x)) + bias)

B_h being a head's attention through its columns of `proj`, or its FFN slice through its columns of `fc2`. With no head
active a branch is the identity. With no FULL head nothing of the block gets a gradient, while the residual stays on the
autograd graph. What is skipped is not computed and not stored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from d2ft_hpc.families.family import BlockFamily, Branch
from d2ft_hpc.families.head_axis import HeadAxis

HeadAxes = Mapping[str, HeadAxis]


class PartAxes(NamedTuple):
    """How a block's parameters split by head, for FULL heads and for FORWARD_ONLY ones, None if these split alike: the
    part of each kind may have been copied before."""

    full: HeadAxes
    forward_only: HeadAxes | None = None


@dataclass(frozen=True)
class BlockHeads:
    """The heads that one block runs for one micro-batch: int64 on the model's device.

    order: [n], the heads that run, FULL ones first, each kind in rising order. num_full: how many are FULL. places:
    [head], each FULL head's place in `order`, -1 for the others.
    """

    order: Tensor
    num_full: int
    places: Tensor

    @property
    def num_forward_only(self) -> int:
        return self.order.numel() - self.num_full

    @property
    def full(self) -> Tensor | None:
        """int64 [n]; None where there is none."""
        return self.order[: self.num_full] if self.num_full else None

    @property
    def forward_only(self) -> Tensor | None:
        """int64 [n]; None where there is none."""
        return self.order[self.num_full :] if self.num_forward_only else None

    @property
    def shape(self) -> tuple[int, int]:
        """Heads that are FULL, and heads that are FORWARD_ONLY: what kernels are made for."""
        return self.num_full, self.num_forward_only

    @property
    def is_dense(self) -> bool:
        """Whether all heads are FULL: then the block's own forward runs, bit for bit."""
        return self.num_full == self.places.numel()

    @property
    def is_shortcut(self) -> bool:
        return self.order.numel() == 0

    @property
    def trains(self) -> bool:
        """Parameters of the block take gradients."""
        return self.num_full > 0


def run_block(
    family: BlockFamily,
    block: nn.Module,
    x: Tensor,
    heads: BlockHeads,
    axes: PartAxes,
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    """Runs a block that is neither dense nor a shortcut.

    x: [sample, token, channel]; returns the same shape and dtype. args, kwargs: what the block's forward takes beside.
    """
    branches = of_others = family.branches(block, axes.full, *args, **kwargs)
    if axes.forward_only is not None:
        of_others = family.branches(block, axes.forward_only, *args, **kwargs)
    for branch, beside in zip(branches, of_others, strict=True):
        x = x + _added(x, heads, branch, beside)
    return x


def _added(x: Tensor, heads: BlockHeads, branch: Branch, beside: Branch) -> Tensor:
    """What a branch adds to x. beside: the same branch, as FORWARD_ONLY heads compute it."""
    full, forward_only = heads.full, heads.forward_only
    if full is None:
        assert forward_only is not None
        with torch.no_grad():
            # Detached, because autocast would cache a copy of a leaf parameter, and this copy would carry no
            # gradient.
            bias = None if branch.bias is None else branch.bias.detach()
            parts = _joined(branch, [beside.inner(branch.norm(x), forward_only)], [forward_only])
            return branch.end(beside.out(parts[0], forward_only, bias))
    normed = branch.norm(x)
    parts, of_parts = [branch.inner(normed, full)], [full]
    if forward_only is not None:
        with torch.no_grad():
            parts.append(beside.inner(normed, forward_only))
        of_parts.append(forward_only)
    parts = _joined(branch, parts, of_parts)
    total = branch.out(parts[0], full, branch.bias)
    if forward_only is not None:
        with torch.no_grad():
            total.add_(beside.out(parts[1], forward_only, None))
    return branch.end(total)


def _joined(branch: Branch, parts: list[Tensor], heads: list[Tensor]) -> list[Tensor]:
    return parts if branch.across is None else list(branch.across(parts, heads))
