"""The attentions of timm's isotropic transformers by head: q, k, v in one matrix or apart, grouped queries, rotary
positions, positions that are added by head, the difference of two attentions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import AttentionRope, apply_rot_embed_cat
from timm.models.beit import Attention as BeitAttention
from timm.models.eva import EvaAttention
from timm.models.vision_transformer import Attention
from timm.models.vision_transformer_relpos import RelPosAttention
from torch import Tensor, nn

from d2ft_hpc.families.head_axis import HeadAxis
from d2ft_hpc.families.head_linear import head_linear, head_part, into_heads
from d2ft_hpc.families.timm_models import class_of_timm, is_identity

DiffAttention = class_of_timm("layers.diff_attention", "DiffAttention")

_KINDS = (Attention, EvaAttention, AttentionRope, BeitAttention, RelPosAttention, DiffAttention)


class Positions(NamedTuple):
    """What a block gets beside x. rope: [..., token, 2 x channel], with the head axis third from last if heads
    differ. mask: as torch's attention takes it, the same for all heads. by_head: added to the scores, [1, head,
    token, token].
    """

    rope: Tensor | None = None
    mask: Tensor | None = None
    is_causal: bool = False
    by_head: Tensor | None = None


def misfits(attn: Any) -> list[str]:
    """Why this attention cannot be cut by head, as phrases whose subject is the block."""
    if type(attn) not in _KINDS:
        return [f"has attention of class {type(attn).__name__}, which no family knows"]
    reasons = []
    if getattr(attn, "gate", None) is not None:
        reasons.append("has gated attention")
    if has_own_bias(attn) and type(attn.qkv) is not nn.Linear:
        reasons.append("has LoRA on attn.qkv, which timm passes by where the biases of q and v are apart")
    return reasons


def num_heads(attn: Any) -> int:
    """A subnet has the query heads that share one key and value head."""
    return int(getattr(attn, "num_kv_heads", attn.num_heads))


def layers(attn: Any) -> tuple[str, ...]:
    """That lead into the heads."""
    return ("attn.qkv",) if attn.qkv is not None else ("attn.q_proj", "attn.k_proj", "attn.v_proj")


def own_axes(attn: Any) -> dict[str, HeadAxis]:
    heads, width = num_heads(attn), attn.proj.out_features
    channels = attn.proj.in_features // heads  # of queries, and of keys:
    head_dim = channels // (attn.num_heads // heads)
    axes = {"attn.proj.weight": HeadAxis((width, heads, channels), 1, splits_rows=False)}
    if attn.qkv is not None:
        into = attn.qkv.in_features
        axes["attn.qkv.weight"] = HeadAxis((3, heads, head_dim, into), 1, splits_rows=True)
        axes["attn.qkv.bias"] = HeadAxis((3, heads, head_dim), 1, splits_rows=True)
        if has_own_bias(attn):
            for name in ("attn.q_bias", "attn.v_bias"):
                axes[name] = HeadAxis((heads, head_dim), 0, splits_rows=True)
        return axes
    for layer, own in (("q_proj", channels), ("k_proj", head_dim), ("v_proj", head_dim)):
        into = attn.q_proj.in_features
        axes[f"attn.{layer}.weight"] = HeadAxis((heads, own, into), 0, splits_rows=True)
        axes[f"attn.{layer}.bias"] = HeadAxis((heads, own), 0, splits_rows=True)
    return axes


def biases(attn: Any, layer: str) -> Mapping[str, slice] | None:
    """As `BlockFamily.biases`, where they are not the layer's own."""
    if layer != "attn.qkv" or not has_own_bias(attn):
        return None
    size = attn.q_bias.numel()
    return {"attn.q_bias": slice(size), "attn.v_bias": slice(2 * size, None)}


def has_own_bias(attn: Any) -> bool:
    """Whether q and v have biases of their own beside a fused qkv; timm then passes the module `qkv` by."""
    return attn.qkv is not None and getattr(attn, "q_bias", None) is not None


@contextmanager
def calling_qkv(attn: Any) -> Iterator[None]:
    """Inside, the module `qkv` has the biases of q and v, and is called."""
    own, of_qkv = attn._parameters, attn.qkv._parameters
    separate = own["q_bias"], own["v_bias"]
    of_qkv["bias"] = torch.cat((separate[0], attn.k_bias, separate[1]))
    own["q_bias"] = own["v_bias"] = None
    try:
        yield
    finally:
        own["q_bias"], own["v_bias"] = separate
        of_qkv["bias"] = None


def set_heads(attn: Any, heads: int) -> None:
    attn.num_heads = heads
    if hasattr(attn, "attn_dim"):
        attn.attn_dim = heads * attn.head_dim


def mix(
    attn: Any, axes: Mapping[str, HeadAxis], normed: Tensor, heads: Tensor, positions: Positions
) -> Tensor:
    """What the subnets `heads` compute from the normed x before `proj`: [sample, token, their channels]."""
    query, key, value = _query_key_value(attn, axes, normed, heads)
    return attend(attn, query, key, value, heads, positions).transpose(1, 2).flatten(2)


def attend(
    attn: Any, query: Tensor, key: Tensor, value: Tensor, heads: Tensor, positions: Positions
) -> Tensor:
    """What `heads` mix of the values; all [sample, head, token, channel]. Queries may have several heads for each."""
    if type(attn) is DiffAttention:
        return _difference(attn, query, key, value, positions)
    if not isinstance(attn, BeitAttention):
        query, key = attn.q_norm(query), attn.k_norm(key)
    if positions.rope is not None:
        query, key = (_rotated(attn, each, positions.rope, heads).type_as(value) for each in (query, key))
    if query.shape[1] > key.shape[1]:
        groups = query.shape[1] // key.shape[1]
        key, value = (each.repeat_interleave(groups, dim=1) for each in (key, value))
    mask = positions.mask if positions.by_head is None else positions.by_head.index_select(1, heads)
    return _softmax(attn, query, key, value, mask, positions.is_causal)


def is_plain(attn: Any) -> bool:
    """Whether `attend` is torch's attention and nothing else."""
    return type(attn) is Attention and is_identity(attn.q_norm) and is_identity(attn.k_norm)


def positions_by_head(attn: Any, of_model: Tensor | None) -> Tensor | None:
    """What is added to the scores of all heads, by this attention itself and by the model: [1, head, token,
    token]."""
    if of_model is not None and of_model.dim() == 3:
        of_model = of_model.unsqueeze(0)
    if isinstance(attn, RelPosAttention):
        own: Tensor | None = of_model if attn.rel_pos is None else attn.rel_pos.get_bias()
        return own
    if getattr(attn, "relative_position_bias_table", None) is None:
        return of_model
    bias: Tensor = attn._get_rel_pos_bias()
    return bias if of_model is None else bias + of_model


def _softmax(
    attn: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool
) -> Tensor:
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        dropout_p=attn.attn_drop.p if attn.training else 0.0,
        is_causal=is_causal,
        scale=attn.scale,
    )


def _difference(attn: Any, query: Tensor, key: Tensor, value: Tensor, positions: Positions) -> Tensor:
    """The difference of a head's two attentions (arXiv 2410.05258), each of half of its queries and keys."""
    halves = [
        norm(half)
        for each, norm in ((query, attn.q_norm), (key, attn.k_norm))
        for half in each.chunk(2, dim=-1)
    ]
    first, second = (
        _softmax(attn, half, of_key, value, positions.mask, positions.is_causal)
        for half, of_key in zip(halves[:2], halves[2:], strict=True)
    )
    share = attn._compute_lambda().type_as(query)
    mixed: Tensor = attn.sub_norm(first - share * second) * (1 - attn.lambda_init)
    return mixed


def _query_key_value(
    attn: Any, axes: Mapping[str, HeadAxis], normed: Tensor, heads: Tensor
) -> Sequence[Tensor]:
    """[sample, head, token, channel] each, of the subnets `heads`."""
    samples, tokens, _ = normed.shape
    if attn.qkv is None:
        head_dim = attn.proj.in_features // attn.num_heads
        return [
            into_heads(block_layer, name, axes, normed, heads)
            .view(samples, tokens, -1, head_dim)
            .transpose(1, 2)
            for block_layer, name in zip((attn.q_proj, attn.k_proj, attn.v_proj), layers(attn), strict=True)
        ]
    if has_own_bias(attn):
        of_query = head_part(axes["attn.q_bias"], attn.q_bias, heads)
        of_value = head_part(axes["attn.v_bias"], attn.v_bias, heads)
        bias = torch.cat((of_query, torch.zeros_like(of_query), of_value))
        qkv = head_linear(axes["attn.qkv.weight"], normed, attn.qkv.weight, bias, heads)
    else:
        qkv = into_heads(attn.qkv, "attn.qkv", axes, normed, heads)
    return qkv.view(samples, tokens, 3, heads.numel(), -1).permute(2, 0, 3, 1, 4).unbind(0)


def _rotated(attn: Any, x: Tensor, rope: Tensor, heads: Tensor) -> Tensor:
    """x: [sample, head, token, channel]; the first tokens have no place in the image."""
    is_by_head = rope.dim() > 2 and rope.shape[-3] > 1
    own = rope.index_select(-3, heads) if is_by_head else rope
    prefix = attn.num_prefix_tokens
    turned = apply_rot_embed_cat(x[:, :, prefix:], own, half=getattr(attn, "rotate_half", False))
    return torch.cat([x[:, :, :prefix], turned], dim=2)


def norm_across(attn: Any) -> Any:
    """The norm over the channels of all heads; None if there is none."""
    norm = getattr(attn, "norm", None)
    return None if is_identity(norm) else norm
