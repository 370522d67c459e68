"""The MLPs of timm's isotropic transformers by head: a head's slice is the same hidden units of every layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from timm.layers import GluMlp, Mlp, SwiGLU
from timm.models.vitamin import GeGluMlp
from torch import Tensor, nn

from d2ft_hpc.families.head_axis import HeadAxis
from d2ft_hpc.families.head_linear import into_heads
from d2ft_hpc.families.timm_models import is_identity

_INTO: dict[type, tuple[str, ...]] = {
    Mlp: ("mlp.fc1",),
    GluMlp: ("mlp.fc1",),
    SwiGLU: ("mlp.fc1_g", "mlp.fc1_x"),
    GeGluMlp: ("mlp.w0", "mlp.w1"),
}


def misfits(mlp: Any) -> list[str]:
    """Why this MLP cannot be cut by head, as phrases whose subject is the block."""
    return [] if type(mlp) in _INTO else [f"has an MLP of class {type(mlp).__name__}, which no family knows"]


def layers(mlp: Any) -> tuple[str, ...]:
    """The layers that lead into the hidden units, the gate first."""
    return _INTO[type(mlp)]


def last(mlp: Any) -> tuple[str, Any]:
    """The layer that leads out of the hidden units: its name in the block, and itself."""
    return ("mlp.w2", mlp.w2) if type(mlp) is GeGluMlp else ("mlp.fc2", mlp.fc2)


def own_axes(mlp: Any, heads: int) -> dict[str, HeadAxis]:
    name, out = last(mlp)
    units, width = out.in_features, out.out_features
    packed = (2,) if type(mlp) is GluMlp else ()
    axes = {f"{name}.weight": HeadAxis.of_units((width,), heads, units, splits_rows=False)}
    for into in layers(mlp):
        axes[f"{into}.weight"] = HeadAxis.of_units(packed, heads, units, (width,), splits_rows=True)
        axes[f"{into}.bias"] = HeadAxis.of_units(packed, heads, units, splits_rows=True)
    return axes


_NO_DROP = nn.Identity()


def drops(mlp: Any) -> tuple[nn.Module, nn.Module]:
    """What drops of the hidden units and of the result; timm's older ViTamin has neither."""
    return getattr(mlp, "drop1", _NO_DROP), getattr(mlp, "drop2", _NO_DROP)


def normed(mlp: Any, x: Tensor) -> Tensor:
    """What the MLP does to its input, x after the block's norm, before its first layers."""
    return mlp.norm(x) if type(mlp) is GeGluMlp else x


def norm_across(mlp: Any) -> Any:
    """The norm over the channels of all heads; None if there is none."""
    return None if type(mlp) is GeGluMlp or is_identity(mlp.norm) else mlp.norm


def activate(mlp: Any, axes: Mapping[str, HeadAxis], x: Tensor, heads: Tensor) -> Tensor:
    """The hidden units of `heads`, [sample, token, unit]."""
    first, *second = (
        into_heads(getattr(mlp, name.removeprefix("mlp.")), name, axes, x, heads) for name in layers(mlp)
    )
    if second:
        hidden = mlp.act(first) * second[0]
    elif type(mlp) is GluMlp:
        one, other = first.chunk(2, dim=-1)
        hidden = one * mlp.act(other) if mlp.gate_last else mlp.act(one) * other
    else:
        hidden = mlp.act(first)
    dropped: Tensor = drops(mlp)[0](hidden)
    return dropped
