"""Which rows and columns of timm's parameters belong to which subnet.

A subnet (block, head) is one attention head with its slice of the FFN: hidden units [h*F/H, (h+1)*F/H) of a block
with H heads and F hidden units (arXiv 2504.12471, section 3). Its parameters are rows of `qkv` and `fc1` (with their
biases) and columns of `proj` and `fc2`. All other parameters belong to no subnet (`ParameterClass`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any

from timm.layers import Mlp
from timm.models.vision_transformer import Attention, Block, VisionTransformer
from torch import Tensor, nn

from d2ft_hpc.errors import UnsupportedModelError

LINEAR_LAYERS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
"""A block's layers whose rows or columns are cut by head."""

_BELOW_BLOCKS = ("patch_embed", "pos_embed", "cls_token", "dist_token", "reg_token", "norm_pre")
"""Of timm's models; the distilled DeiTs have a token of their own."""

SUPPORTED = (
    "timm VisionTransformer models whose blocks are timm's Block with Attention and Mlp: fused qkv, any head size, "
    "LayerScale, q/k norm, DropPath, dropout, missing biases, class and register tokens, any pooling, peft's LoRA"
)


class ParameterClass(Enum):
    """What a parameter belongs to; the classes after SUBNET are owned by no subnet."""

    SUBNET = "subnet"
    EMBEDDING = "embedding"
    """Patch projection, positions, class, distillation and register tokens, pre-norm: below every block."""
    SHARED = "shared"
    """A block's norms, q/k norms, LayerScale, and the biases of `proj` and `fc2`: shared by the block's heads."""
    CLASSIFIER = "classifier"
    """Everything above the last block: final norm, pooling, head."""


@dataclass(frozen=True)
class HeadAxis:
    """How one parameter splits by head: viewed as `view_shape`, the heads lie along `axis`."""

    view_shape: tuple[int, ...]
    axis: int
    splits_rows: bool

    def select(self, parameter: Tensor, heads: Tensor) -> Tensor:
        """The part of `parameter` that the heads own, of the parameter's rank: fewer rows, or fewer columns.

        heads: int64 [n], on the parameter's device. Differentiable; the gradient has the parameter's full shape.
        """
        chosen = parameter.view(self.view_shape).index_select(self.axis, heads)
        if self.splits_rows:
            return chosen.reshape(-1, *parameter.shape[1:])
        return chosen.reshape(parameter.shape[0], -1)

    def spread(self, part: Tensor, heads: Tensor) -> Tensor:
        """A tensor of the parameter's shape with what `select` would take for `heads`, and zeros for all others."""
        shape = list(self.view_shape)
        whole = part.new_zeros(shape)
        shape[self.axis] = heads.numel()
        return whole.index_copy_(self.axis, heads, part.reshape(shape)).view(self.parameter_shape)

    def sum_by_head(self, tensor: Tensor) -> Tensor:
        """Sums of the parameter's entries by head.

        tensor: [..., *parameter.shape] with any leading dimensions. Returns [..., head].
        """
        leading = tensor.dim() - len(self.parameter_shape)
        viewed = tensor.reshape(*tensor.shape[:leading], *self.view_shape)
        return viewed.movedim(leading + self.axis, leading).flatten(leading + 1).sum(-1)

    @property
    def parameter_shape(self) -> tuple[int, ...]:
        if self.splits_rows:
            rows = self.view_shape[: self.axis + 2]
            return (math.prod(rows), *self.view_shape[self.axis + 2 :])
        return (self.view_shape[0], math.prod(self.view_shape[1:]))


@dataclass(frozen=True)
class SubnetMap:
    """The subnets of one model. `head_axes` maps a name inside a block ("attn.qkv.weight") to its split by head."""

    num_blocks: int
    num_heads: int
    head_axes: dict[str, HeadAxis]

    @staticmethod
    def of(model: nn.Module) -> SubnetMap:
        """Reads the map off the model; raises UnsupportedModelError with every reason why it does not fit."""
        if not isinstance(model, VisionTransformer):
            raise _unsupported(model, ["it is not a timm VisionTransformer"])
        blocks = list(model.blocks)
        reasons = [f"block {i} {reason}" for i, block in enumerate(blocks) for reason in _misfits(block)]
        if reasons:
            raise _unsupported(model, reasons)
        axes = [_head_axes(block) for block in blocks]
        differing = [i for i, block_axes in enumerate(axes) if block_axes != axes[0]]
        if not blocks or differing:
            where = f"blocks {differing} differ in shape from block 0" if blocks else "it has no blocks"
            raise _unsupported(model, [where])
        return SubnetMap(len(blocks), blocks[0].attn.num_heads, axes[0])

    def classify(self, parameter_name: str) -> ParameterClass:
        """The class of a parameter by its name in the model (timm's name)."""
        if parameter_name.startswith("blocks."):
            inner = parameter_name.split(".", 2)[2]
            return ParameterClass.SUBNET if inner in self.head_axes else ParameterClass.SHARED
        if parameter_name.split(".")[0] in _BELOW_BLOCKS:
            return ParameterClass.EMBEDDING
        return ParameterClass.CLASSIFIER

    def parameters(self, model: nn.Module) -> Iterator[tuple[int, str, nn.Parameter]]:
        """(block, name inside the block, parameter) of all that subnets own."""
        for index, block in enumerate(model.get_submodule("blocks").children()):
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


def _head_axes(block: Block) -> dict[str, HeadAxis]:
    heads, width = block.attn.num_heads, block.attn.qkv.in_features
    head_dim = block.attn.qkv.out_features // (3 * heads)
    units = block.mlp.fc1.out_features // heads
    axes = {
        "attn.qkv.weight": HeadAxis((3, heads, head_dim, width), 1, splits_rows=True),
        "attn.qkv.bias": HeadAxis((3, heads, head_dim), 1, splits_rows=True),
        "attn.proj.weight": HeadAxis((width, heads, head_dim), 1, splits_rows=False),
        "mlp.fc1.weight": HeadAxis((heads, units, width), 0, splits_rows=True),
        "mlp.fc1.bias": HeadAxis((heads, units), 0, splits_rows=True),
        "mlp.fc2.weight": HeadAxis((width, heads, units), 1, splits_rows=False),
    }
    has_bias = {f"{name}.bias" for name in LINEAR_LAYERS if block.get_submodule(name).bias is not None}
    axes = {name: axis for name, axis in axes.items() if name.endswith(".weight") or name in has_bias}
    return axes | _adapter_axes(block, axes)


def _adapter_axes(block: Block, axes: dict[str, HeadAxis]) -> dict[str, HeadAxis]:
    """Of the parameters of layers that carry LoRA: the weights by peft's name, the factors that heads own."""
    more: dict[str, HeadAxis] = {}
    for name in LINEAR_LAYERS:
        layer = block.get_submodule(name)
        if type(layer) is nn.Linear:
            continue
        for kind in ("weight", "bias"):
            if f"{name}.{kind}" in axes:
                more[f"{name}.base_layer.{kind}"] = axes[f"{name}.{kind}"]
        of_weight = axes[f"{name}.weight"]
        for adapter, down in layer.lora_A.items():
            rank = down.out_features
            if of_weight.splits_rows:
                shape = (*of_weight.view_shape[:-1], rank)
                more[f"{name}.lora_B.{adapter}.weight"] = HeadAxis(shape, of_weight.axis, splits_rows=True)
            else:
                shape = (rank, *of_weight.view_shape[1:])
                more[f"{name}.lora_A.{adapter}.weight"] = HeadAxis(shape, of_weight.axis, splits_rows=False)
    return more


def _misfits(block: Any) -> list[str]:
    """Why a block cannot be cut by head; empty if it can."""
    if type(block) is not Block:
        return [f"is a {type(block).__name__}, not timm's Block"]
    if type(block.attn) is not Attention:
        return [f"has attention of class {type(block.attn).__name__}, not timm's Attention"]
    if type(block.mlp) is not Mlp:
        return [
            f"has an MLP of class {type(block.mlp).__name__} (SwiGLU and gated MLPs are not supported), not Mlp"
        ]
    reasons = []
    if getattr(block.attn, "gate", None) is not None:
        reasons.append("has gated attention")
    if not isinstance(getattr(block.attn, "norm", nn.Identity()), nn.Identity):
        reasons.append("normalises across heads before proj (scale_attn_norm)")
    if not isinstance(getattr(block.mlp, "norm", nn.Identity()), nn.Identity):
        reasons.append("normalises across hidden units before fc2 (scale_mlp_norm)")
    for name in LINEAR_LAYERS:
        layer = block.get_submodule(name)
        if type(layer) is not nn.Linear and not _is_plain_lora(layer):
            reasons.append(
                f"has {name} of class {type(layer).__name__}, not Linear, nor Linear with peft's plain LoRA"
            )
    if not reasons and block.mlp.fc1.out_features % block.attn.num_heads:
        reasons.append(
            f"has {block.mlp.fc1.out_features} hidden units, not divisible by {block.attn.num_heads} heads"
        )
    return reasons


def _is_plain_lora(layer: nn.Module) -> bool:
    """A Linear that peft has wrapped, without the variants that change more than a low-rank sum (DoRA, ...)."""
    return (
        type(getattr(layer, "base_layer", None)) is nn.Linear
        and hasattr(layer, "lora_A")
        and not getattr(layer, "lora_variant", {})
        and not any(getattr(layer, "use_dora", {}).values())
        and not any(getattr(layer, "lora_bias", {}).values())
    )


def _unsupported(model: nn.Module, reasons: list[str]) -> UnsupportedModelError:
    shown = "; ".join(reasons[:3]) + (f"; and {len(reasons) - 3} more" if len(reasons) > 3 else "")
    return UnsupportedModelError(
        f"model {type(model).__name__} is not supported: {shown}. Supported: {SUPPORTED}."
    )
