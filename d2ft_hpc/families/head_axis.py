"""How the parameters of a block split by head."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


@dataclass(frozen=True)
class HeadAxis:
    """How one parameter splits by head: viewed as `view_shape`, the heads lie along `axis`.

    units: where heads have unequal shares of the dimension that follows `axis`, how many units they have together:
        head h of H owns [h * units // H, (h + 1) * units // H), and `view_shape` has the largest share. Parts of heads
        are then filled up to it with zeros, but not those of all heads together. None: equal shares.
    """

    view_shape: tuple[int, ...]
    axis: int
    splits_rows: bool
    units: int | None = None

    @staticmethod
    def of_units(
        before: tuple[int, ...], heads: int, units: int, after: tuple[int, ...] = (), *, splits_rows: bool
    ) -> HeadAxis:
        """The split of a parameter [*before, units, *after] whose units the heads share."""
        equal = units % heads == 0
        shape = (*before, heads, -(-units // heads), *after)
        return HeadAxis(shape, len(before), splits_rows, None if equal else units)

    def of(self, heads: int) -> HeadAxis:
        """The split of what `select` takes for so many heads."""
        if heads == self.heads:
            return self
        shape = (*self.view_shape[: self.axis], heads, *self.view_shape[self.axis + 1 :])
        return replace(self, view_shape=shape, units=None)

    def select(self, parameter: Tensor, heads: Tensor) -> Tensor:
        """The part of `parameter` that the heads own, of the parameter's rank: fewer rows, or fewer columns.

        heads: int64 [n], on the parameter's device. Differentiable; the gradient has the parameter's full shape.
        """
        if self.units is None:
            chosen = parameter.view(self.view_shape).index_select(self.axis, heads)
        else:
            index, is_own = self._units_of(heads)
            chosen = parameter.view(self._shape_of_units).index_select(self.axis, index)
            chosen = chosen * is_own.to(chosen.dtype).view(-1, *[1] * (chosen.dim() - self.axis - 1))
        if self.splits_rows:
            return chosen.reshape(-1, *parameter.shape[1:])
        return chosen.reshape(parameter.shape[0], -1)

    def spread(self, part: Tensor, heads: Tensor) -> Tensor:
        """A tensor of the parameter's shape with what `select` would take for `heads`, and zeros for all others."""
        whole = part.new_zeros(self.parameter_shape)
        self.put(part, heads, whole)
        return whole

    def put(self, part: Tensor, heads: Tensor, whole: Tensor) -> None:
        """Writes what `select` would take for `heads` to its place in `whole`, which has zeros there."""
        if self.units is None:
            shape = list(self.view_shape)
            shape[self.axis] = heads.numel()
            whole.view(self.view_shape).index_copy_(self.axis, heads, part.reshape(shape))
            return
        index, is_own = self._units_of(heads)
        shape = [*self.view_shape[: self.axis], index.numel(), *self.view_shape[self.axis + 2 :]]
        own = part.reshape(shape) * is_own.to(part.dtype).view(-1, *[1] * (len(shape) - self.axis - 1))
        whole.view(self._shape_of_units).index_add_(self.axis, index, own)

    def sum_by_head(self, tensor: Tensor) -> Tensor:
        """Sums of the parameter's entries by head.

        tensor: [..., *parameter.shape] with any leading dimensions. Returns [..., head].
        """
        leading = tensor.dim() - len(self.parameter_shape)
        before = tensor.shape[:leading]
        if self.units is None:
            viewed = tensor.reshape(*before, *self.view_shape)
            return viewed.movedim(leading + self.axis, leading).flatten(leading + 1).sum(-1)
        viewed = tensor.reshape(*before, *self._shape_of_units).movedim(leading + self.axis, leading)
        of_units = viewed.reshape(*before, self.units, -1).sum(-1)
        sums = of_units.new_zeros(*before, self.heads)
        return sums.index_add_(-1, self._head_of_unit(tensor.device), of_units)

    def count(self, heads: Tensor) -> Tensor:
        """How many units the heads own: int64, on their device."""
        units = self._shape_of_units[self.axis]
        return ((heads + 1) * units // self.heads - heads * units // self.heads).sum()

    @property
    def heads(self) -> int:
        return self.view_shape[self.axis]

    @property
    def entries(self) -> npt.NDArray[np.int64]:
        """How many of the parameter's numbers each head owns, int64 [head]."""
        units = self._shape_of_units[self.axis]
        own = np.diff(np.arange(self.heads + 1) * units // self.heads)
        return own * (math.prod(self.parameter_shape) // units)

    @property
    def parameter_shape(self) -> tuple[int, ...]:
        shape = self._shape_of_units
        if self.splits_rows:
            return (math.prod(shape[: self.axis + 1]), *shape[self.axis + 1 :])
        return (shape[0], math.prod(shape[1:]))

    @property
    def _shape_of_units(self) -> tuple[int, ...]:
        """The view in which the heads' units lie side by side along `axis`."""
        units = math.prod(self.view_shape[self.axis : self.axis + 2]) if self.units is None else self.units
        return (*self.view_shape[: self.axis], units, *self.view_shape[self.axis + 2 :])

    def _units_of(self, heads: Tensor) -> tuple[Tensor, Tensor]:
        """The heads' units and which of them are no padding: int64 and bool [n x largest share], or [units] for all
        heads."""
        assert self.units is not None
        if heads.numel() == self.heads:  # nothing is filled up
            places = torch.empty_like(heads).scatter_(0, heads, torch.arange(self.heads, device=heads.device))
            index = places[self._head_of_unit(heads.device)].argsort(stable=True)
            return index, torch.ones_like(index, dtype=torch.bool)
        first, end = heads * self.units // self.heads, (heads + 1) * self.units // self.heads
        index = first[:, None] + torch.arange(self.view_shape[self.axis + 1], device=heads.device)
        return index.clamp(max=self.units - 1).flatten(), (index < end[:, None]).flatten()

    def _head_of_unit(self, device: torch.device) -> Tensor:
        """int64 [unit]"""
        assert self.units is not None
        edges = torch.arange(1, self.heads + 1, device=device) * self.units // self.heads
        return torch.searchsorted(edges, torch.arange(self.units, device=device), right=True)


@dataclass(frozen=True)
class TakenHeads(HeadAxis):
    """The split of a parameter of which some heads' part was copied already: `select` gives `part`, whatever it is
    asked for. Where shares are unequal, `part` may be filled up with more zeros than `HeadAxis.select` does.
    """

    part: Tensor | None = None

    def select(self, parameter: Tensor, heads: Tensor) -> Tensor:
        assert self.part is not None
        return self.part
