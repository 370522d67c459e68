"""timm's Eva: EVA-02, DINOv3, Perception Encoder, other ViTs with rotary positions; gated MLPs, grouped queries."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import AttentionRope, GluMlp, Mlp, SwiGLU, apply_rot_embed_cat
from timm.models.eva import Eva, EvaAttention, EvaBlock, EvaBlockPostNorm
from torch import Tensor, nn

from d2ft_hpc.errors import UnsupportedModelError
from d2ft_hpc.families.family import Branch, Drops, KernelParts
from d2ft_hpc.families.head_axis import HeadAxis
from d2ft_hpc.families.head_linear import head_linear, head_part, into_heads, out_of_heads
from d2ft_hpc.families.low_rank import is_linear
from d2ft_hpc.families.timm_models import TimmFamily, is_identity, patches, require_one_mask


class TimmEva(TimmFamily):
    """A subnet is a group of query heads with its key and value head, and its slice of the (gated) MLP."""

    supported = (
        "timm Eva models (EVA-02, DINOv3, PE, rotary ViTs): fused or separate q, k, v, any rotary positions, grouped "
        "queries, SwiGLU or GELU, without norms across heads or hidden units"
    )
    names_below = ("patch_embed", "pos_embed", "cls_token", "reg_token", "rope", "norm_pre")
    refuses_parts = "timm's Eva gives each block rotary positions, which parts of it would not get"

    def has(self, model: nn.Module) -> bool:
        return isinstance(model, Eva)

    def misfits(self, block: nn.Module) -> list[str]:
        if type(block) not in (EvaBlock, EvaBlockPostNorm):
            return [f"is a {type(block).__name__}, not timm's EvaBlock or EvaBlockPostNorm"]
        attn: Any = block.attn
        mlp: Any = block.mlp
        if type(attn) not in (EvaAttention, AttentionRope):
            return [f"has attention of class {type(attn).__name__}, not EvaAttention or AttentionRope"]
        if type(mlp) not in (Mlp, GluMlp, SwiGLU):
            return [f"has an MLP of class {type(mlp).__name__}, not Mlp, GluMlp or SwiGLU"]
        reasons = []
        if getattr(attn, "gate", None) is not None:
            reasons.append("has gated attention")
        if not is_identity(attn.norm):
            reasons.append("normalises across heads before proj (scale_attn_inner)")
        if not is_identity(mlp.norm):
            reasons.append("normalises across hidden units before fc2 (scale_mlp)")
        for names in self.layers(block).values():
            for name in names:
                layer = block.get_submodule(name)
                if not is_linear(layer):
                    reasons.append(
                        f"has {name} of class {type(layer).__name__}, not Linear, nor Linear with peft's plain LoRA"
                    )
        if _has_own_bias(attn) and type(attn.qkv) is not nn.Linear:
            reasons.append("has LoRA on attn.qkv, which timm passes by where the biases of q and v are apart")
        return reasons

    def below(self, model: Any, images: Tensor) -> tuple[Tensor, Any]:
        x, rope = model._pos_embed(patches(model.patch_embed, images))
        is_by_depth = rope is not None and getattr(model, "rope_mixed", False)
        return model.norm_pre(x), (rope, is_by_depth)

    def goes_beside(self, name: str) -> bool:
        return name.startswith("rope.")

    def arguments(self, beside: Any, index: int) -> Mapping[str, Any]:
        rope, is_by_depth = beside
        return {"rope": rope[index] if is_by_depth else rope}

    def of_any_size(self, model: Any) -> Any:
        if not model.dynamic_img_size:
            raise UnsupportedModelError(
                "this Eva has rotary positions for one image size only: make it with dynamic_img_size=True "
                "(model.options.dynamic_img_size=true)"
            )
        return model

    def take_any_size(self, model: Any) -> None:
        self.of_any_size(model)  # or it is refused

    @contextmanager
    def taking_any_size(self, model: Any) -> Iterator[None]:
        self.take_any_size(model)
        yield

    def num_heads(self, block: Any) -> int:
        return int(getattr(block.attn, "num_kv_heads", block.attn.num_heads))

    def layers(self, block: Any) -> Mapping[str, Sequence[str]]:
        attn = block.attn
        into = ("attn.qkv",) if attn.qkv is not None else ("attn.q_proj", "attn.k_proj", "attn.v_proj")
        hidden = ("mlp.fc1_g", "mlp.fc1_x") if type(block.mlp) is SwiGLU else ("mlp.fc1",)
        return {"qkv": into, "proj": ("attn.proj",), "fc1": hidden, "fc2": ("mlp.fc2",)}

    def biases(self, block: Any, layer: str) -> Mapping[str, slice]:
        if layer == "attn.qkv" and _has_own_bias(block.attn):
            size = block.attn.q_bias.numel()
            return {"attn.q_bias": slice(size), "attn.v_bias": slice(2 * size, None)}
        return super().biases(block, layer)

    def calling(self, block: Any) -> AbstractContextManager[None] | None:
        return _calling_qkv(block.attn) if _has_own_bias(block.attn) else None

    def own_axes(self, block: Any) -> dict[str, HeadAxis]:
        attn, mlp, heads = block.attn, block.mlp, self.num_heads(block)
        width = attn.proj.out_features
        channels, units = attn.proj.in_features // heads, mlp.fc2.in_features  # of queries, and of keys:
        head_dim = channels // (attn.num_heads // heads)

        def rows(name: str, own: int) -> dict[str, HeadAxis]:
            return {
                f"attn.{name}.weight": HeadAxis((heads, own, width), 0, splits_rows=True),
                f"attn.{name}.bias": HeadAxis((heads, own), 0, splits_rows=True),
            }

        axes = {"attn.proj.weight": HeadAxis((width, heads, channels), 1, splits_rows=False)}
        if attn.qkv is not None:
            axes["attn.qkv.weight"] = HeadAxis((3, heads, head_dim, width), 1, splits_rows=True)
            axes["attn.qkv.bias"] = HeadAxis((3, heads, head_dim), 1, splits_rows=True)
            if _has_own_bias(attn):
                for name in ("attn.q_bias", "attn.v_bias"):
                    axes[name] = HeadAxis((heads, head_dim), 0, splits_rows=True)
        else:
            axes |= rows("q_proj", channels) | rows("k_proj", head_dim) | rows("v_proj", head_dim)
        packed = (2,) if type(mlp) is GluMlp else ()
        for name in self.layers(block)["fc1"]:
            axes[f"{name}.weight"] = HeadAxis.of_units(packed, heads, units, (width,), splits_rows=True)
            axes[f"{name}.bias"] = HeadAxis.of_units(packed, heads, units, splits_rows=True)
        axes["mlp.fc2.weight"] = HeadAxis.of_units((width,), heads, units, splits_rows=False)
        return axes

    def branches(
        self,
        block: Any,
        axes: Mapping[str, HeadAxis],
        rope: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Sequence[Branch]:
        """attn_mask must broadcast over the heads."""
        require_one_mask(attn_mask)
        attn, mlp = block.attn, block.mlp
        project = partial(out_of_heads, attn.proj, "attn.proj", axes)
        contract = partial(out_of_heads, mlp.fc2, "mlp.fc2", axes)

        def mix(normed: Tensor, heads: Tensor) -> Tensor:
            query, key, value = _query_key_value(attn, axes, normed, heads)
            query, key = attn.q_norm(query), attn.k_norm(key)
            if rope is not None:
                is_by_head = rope.dim() > 2 and rope.shape[-3] > 1
                own = rope.index_select(-3, heads) if is_by_head else rope
                query, key = (_rotated(attn, each, own).type_as(value) for each in (query, key))
            if query.shape[1] > key.shape[1]:
                groups = query.shape[1] // key.shape[1]
                key, value = (each.repeat_interleave(groups, dim=1) for each in (key, value))
            mixed = F.scaled_dot_product_attention(
                query,
                key,
                value,
                attn_mask=attn_mask,
                dropout_p=attn.attn_drop.p if attn.training else 0.0,
                is_causal=is_causal,
            )
            return mixed.transpose(1, 2).flatten(2)

        def activate(normed: Tensor, heads: Tensor) -> Tensor:
            if type(mlp) is SwiGLU:
                gate, hidden = (
                    into_heads(layer, name, axes, normed, heads)
                    for layer, name in ((mlp.fc1_g, "mlp.fc1_g"), (mlp.fc1_x, "mlp.fc1_x"))
                )
                hidden = mlp.act(gate) * hidden
            else:
                hidden = into_heads(mlp.fc1, "mlp.fc1", axes, normed, heads)
                if type(mlp) is GluMlp:
                    first, second = hidden.chunk(2, dim=-1)
                    hidden = first * mlp.act(second) if mlp.gate_last else mlp.act(first) * second
                else:
                    hidden = mlp.act(hidden)
            dropped: Tensor = mlp.drop1(hidden)
            return dropped

        before, after = _norms_and_scales(block)
        return (
            Branch(
                before[0], mix, project, attn.proj.bias,
                lambda branch: block.drop_path1(after[0](attn.proj_drop(branch))),
            ),
            Branch(
                before[1], activate, contract, mlp.fc2.bias,
                lambda branch: block.drop_path2(after[1](mlp.drop2(branch))),
            ),
        )  # fmt: skip

    def drops(self, block: Any) -> Drops:
        return Drops(
            {"attn.attn_drop": block.attn.attn_drop, "mlp.drop1": block.mlp.drop1},
            (block.attn.proj_drop, block.mlp.drop2),
            (block.drop_path1, block.drop_path2),
        )

    def set_heads(self, block: Any, heads: int) -> None:
        raise NotImplementedError(self.refuses_parts)

    def kernel_parts(self, block: Any) -> KernelParts | None:
        return None


def _has_own_bias(attn: Any) -> bool:
    """Whether q and v have biases of their own beside a fused qkv; timm then passes the module `qkv` by."""
    return attn.qkv is not None and getattr(attn, "q_bias", None) is not None


@contextmanager
def _calling_qkv(attn: Any) -> Iterator[None]:
    """Inside, the biases of q and v are the module's `qkv`, which is then called."""
    own, of_qkv = attn._parameters, attn.qkv._parameters
    biases = own["q_bias"], own["v_bias"]
    of_qkv["bias"] = torch.cat((biases[0], attn.k_bias, biases[1]))
    own["q_bias"] = own["v_bias"] = None
    try:
        yield
    finally:
        own["q_bias"], own["v_bias"] = biases
        of_qkv["bias"] = None


def _query_key_value(
    attn: Any, axes: Mapping[str, HeadAxis], normed: Tensor, heads: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """[sample, head, token, channel] each, of the subnets `heads`; queries may have several heads for each of them."""
    samples, tokens, _ = normed.shape
    if attn.qkv is None:
        query, key, value = (
            into_heads(layer, name, axes, normed, heads)
            .view(samples, tokens, -1, attn.proj.in_features // attn.num_heads)
            .transpose(1, 2)
            for layer, name in (
                (attn.q_proj, "attn.q_proj"),
                (attn.k_proj, "attn.k_proj"),
                (attn.v_proj, "attn.v_proj"),
            )
        )
        return query, key, value
    if _has_own_bias(attn):
        of_query = head_part(axes["attn.q_bias"], attn.q_bias, heads)
        of_value = head_part(axes["attn.v_bias"], attn.v_bias, heads)
        bias = torch.cat((of_query, torch.zeros_like(of_query), of_value))
        qkv = head_linear(axes["attn.qkv.weight"], normed, attn.qkv.weight, bias, heads)
    else:
        qkv = into_heads(attn.qkv, "attn.qkv", axes, normed, heads)
    query, key, value = qkv.view(samples, tokens, 3, heads.numel(), -1).permute(2, 0, 3, 1, 4).unbind(0)
    return query, key, value


def _rotated(attn: Any, x: Tensor, rope: Tensor) -> Tensor:
    """x: [sample, head, token, channel], of which the first tokens have no place in the image."""
    prefix = attn.num_prefix_tokens
    turned = apply_rot_embed_cat(x[:, :, prefix:], rope, half=getattr(attn, "rotate_half", False))
    return torch.cat([x[:, :, :prefix], turned], dim=2)


_OnTokens = Callable[[Tensor], Tensor]


def _norms_and_scales(block: Any) -> tuple[tuple[_OnTokens, _OnTokens], tuple[_OnTokens, _OnTokens]]:
    """What attention and MLP do before the heads, and after the sum over them."""
    if isinstance(block, EvaBlockPostNorm):
        return (nn.Identity(), nn.Identity()), (block.norm1, block.norm2)

    def scaled(gamma: Tensor | None) -> _OnTokens:
        return lambda branch: branch if gamma is None else gamma * branch

    return (block.norm1, block.norm2), (scaled(block.gamma_1), scaled(block.gamma_2))
