"""Which rows and columns of a model's parameters belong to which subnet.

A subnet (block, head) is one attention head with its slice of the FFN: hidden units [h*F/H, (h+1)*F/H) of a block
with H heads and F hidden units (arXiv 2504.12471, section 3). Its parameters are rows of the layers that lead into the
heads (with their biases) and columns of those that lead out of them; the model's family knows which. All other
parameters belong to no subnet (`ParameterClass`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

from torch import nn

from d2ft_hpc.errors import UnsupportedModelError
from d2ft_hpc.families.family import BlockFamily
from d2ft_hpc.families.head_axis import HeadAxis
from d2ft_hpc.families.table import family_of


class ParameterClass(Enum):
    """What a parameter belongs to; the classes after SUBNET are owned by no subnet."""

    SUBNET = "subnet"
    EMBEDDING = "embedding"
    """Patch projection, positions, class, distillation and register tokens, pre-norm, words: below every block."""
    SHARED = "shared"
    """A block's norms, q/k norms, LayerScale, and the biases of layers that lead out of the heads: shared by the
    block's heads."""
    CLASSIFIER = "classifier"
    """Everything above the last block: final norm, pooling, head."""


@dataclass(frozen=True)
class SubnetMap:
    """The subnets of one model.

    head_axes: for each name inside a block ("attn.qkv.weight"), how it splits by head. part_axes: by block, the same of
    all that its heads compute with in parts: its own names of `head_axes`, and norms across heads, which no head owns.
    layers: names inside a block of the linear layers that are cut by head.
    """

    family: BlockFamily
    num_blocks: int
    num_heads: int
    head_axes: dict[str, HeadAxis]
    part_axes: tuple[dict[str, HeadAxis], ...]
    layers: tuple[str, ...]

    @staticmethod
    def of(model: nn.Module) -> SubnetMap:
        """Reads the map off the model; raises UnsupportedModelError with every reason why it does not fit."""
        family = family_of(model)
        blocks = family.blocks(model)
        misfits: dict[str, list[int]] = {}
        for index, block in enumerate(blocks):
            for reason in family.misfits(block):
                misfits.setdefault(reason, []).append(index)
        if misfits:
            raise _unsupported(
                model,
                [
                    f"block {indices[0]} {reason}"
                    + (f" (and {len(indices) - 1} like it)" if indices[1:] else "")
                    for reason, indices in misfits.items()
                ],
            )
        heads = [family.num_heads(block) for block in blocks]
        axes = [family.head_axes(block) for block in blocks]
        # LoRA may be on some blocks only, but is the same on all of these.
        head_axes = {name: axis for of_block in axes for name, axis in of_block.items()}
        differing = [
            i
            for i, of_block in enumerate(axes)
            if heads[i] != heads[0]
            or not of_block.items() <= head_axes.items()
            or {name for name in head_axes if not _is_adapters(name)} - of_block.keys()
        ]
        if not blocks or differing:
            where = f"blocks {differing} differ in shape from block 0" if blocks else "it has no blocks"
            if len(set(heads)) > 1:
                numbers = " or ".join(map(str, sorted(set(heads))))
                where = (
                    f"its blocks have {numbers} heads (of keys, which queries may share), not as many in each"
                )
            raise _unsupported(model, [where])
        parts = tuple(
            of_block | family.norm_axes(block) for block, of_block in zip(blocks, axes, strict=True)
        )
        layers = tuple(name for names in family.layers(blocks[0]).values() for name in names)
        return SubnetMap(family, len(blocks), heads[0], head_axes, parts, layers)

    def classify(self, parameter_name: str) -> ParameterClass:
        """The class of a parameter by its name in the model."""
        place = self.place_of(parameter_name)
        if place is not None:
            return ParameterClass.SUBNET if place[1] in self.head_axes else ParameterClass.SHARED
        is_below = self.family.is_below(parameter_name)
        return ParameterClass.EMBEDDING if is_below else ParameterClass.CLASSIFIER

    def place_of(self, name: str) -> tuple[int, str] | None:
        """The block, and the name inside the block, of the parameter or module of this name in the model; None
        outside the blocks."""
        before = f"{self.family.blocks_path}."
        if not name.startswith(before):
            return None
        block, inner = name.removeprefix(before).split(".", 1)
        return int(block), inner

    def blocks(self, model: nn.Module) -> list[nn.Module]:
        return self.family.blocks(model)

    def parameters(self, model: nn.Module) -> Iterator[tuple[int, str, nn.Parameter]]:
        """(block, name inside the block, parameter) of all that subnets own."""
        for index, block in enumerate(self.blocks(model)):
            for name, parameter in block.named_parameters():
                if name in self.head_axes:
                    yield index, name, parameter

    @property
    def has_adapters(self) -> bool:
        """Some layers carry LoRA."""
        return any("lora_" in name for name in self.head_axes)

    @property
    def shape(self) -> tuple[int, int]:
        """(blocks, heads)."""
        return self.num_blocks, self.num_heads


def _is_adapters(name: str) -> bool:
    """Whether the name is one of peft's, of a low-rank factor or of the weight that factors are added to."""
    return "lora_" in name or ".base_layer." in name


def _unsupported(model: nn.Module, reasons: list[str]) -> UnsupportedModelError:
    shown = "; ".join(reasons[:3]) + (f"; and {len(reasons) - 3} more" if len(reasons) > 3 else "")
    return UnsupportedModelError(
        f"model {type(model).__name__} is not supported: {shown}; d2ft-hpc models lists what is of timm's"
    )
