"""timm's VisionTransformer with Block: fused q, k, v, and an MLP of two layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch.nn.functional as F
from timm.layers import DropPath, LayerScale, Mlp
from timm.models.vision_transformer import Attention, Block, VisionTransformer
from torch import Tensor, nn

from d2ft_hpc.families.family import Branch, Drops, KernelParts, rate_of
from d2ft_hpc.families.head_axis import HeadAxis
from d2ft_hpc.families.head_linear import into_heads, out_of_heads
from d2ft_hpc.families.low_rank import is_linear
from d2ft_hpc.families.timm_models import TimmFamily, is_identity, patches, require_one_mask


class TimmVit(TimmFamily):
    supported = (
        "timm VisionTransformer models whose blocks are timm's Block with Attention and Mlp: fused qkv, any head size, "
        "LayerScale, q/k norm, DropPath, dropout, missing biases, class and register tokens, any pooling, peft's LoRA"
    )
    names_below = ("patch_embed", "pos_embed", "cls_token", "dist_token", "reg_token", "norm_pre")
    """The distilled DeiTs have a token of their own."""

    def has(self, model: nn.Module) -> bool:
        return isinstance(model, VisionTransformer)

    def misfits(self, block: nn.Module) -> list[str]:
        if type(block) is not Block:
            return [f"is a {type(block).__name__}, not timm's Block"]
        if type(block.attn) is not Attention:
            return [f"has attention of class {type(block.attn).__name__}, not timm's Attention"]
        if type(block.mlp) is not Mlp:
            return [f"has an MLP of class {type(block.mlp).__name__}, not Mlp"]
        reasons = []
        if getattr(block.attn, "gate", None) is not None:
            reasons.append("has gated attention")
        if not is_identity(getattr(block.attn, "norm", None)):
            reasons.append("normalises across heads before proj (scale_attn_norm)")
        if not is_identity(getattr(block.mlp, "norm", None)):
            reasons.append("normalises across hidden units before fc2 (scale_mlp_norm)")
        for names in self.layers(block).values():
            for name in names:
                layer = block.get_submodule(name)
                if not is_linear(layer):
                    reasons.append(
                        f"has {name} of class {type(layer).__name__}, not Linear, nor Linear with peft's plain LoRA"
                    )
        return reasons

    def below(self, model: Any, images: Tensor) -> tuple[Tensor, Any]:
        return model.norm_pre(model.patch_drop(model._pos_embed(patches(model.patch_embed, images)))), None

    def num_heads(self, block: Any) -> int:
        return int(block.attn.num_heads)

    def layers(self, block: Any) -> Mapping[str, Sequence[str]]:
        return {"qkv": ("attn.qkv",), "proj": ("attn.proj",), "fc1": ("mlp.fc1",), "fc2": ("mlp.fc2",)}

    def own_axes(self, block: Any) -> dict[str, HeadAxis]:
        heads, width, units = block.attn.num_heads, block.attn.qkv.in_features, block.mlp.fc1.out_features
        head_dim = block.attn.qkv.out_features // (3 * heads)
        return {
            "attn.qkv.weight": HeadAxis((3, heads, head_dim, width), 1, splits_rows=True),
            "attn.qkv.bias": HeadAxis((3, heads, head_dim), 1, splits_rows=True),
            "attn.proj.weight": HeadAxis((width, heads, head_dim), 1, splits_rows=False),
            "mlp.fc1.weight": HeadAxis.of_units((), heads, units, (width,), splits_rows=True),
            "mlp.fc1.bias": HeadAxis.of_units((), heads, units, splits_rows=True),
            "mlp.fc2.weight": HeadAxis.of_units((width,), heads, units, splits_rows=False),
        }

    def branches(
        self,
        block: Any,
        axes: Mapping[str, HeadAxis],
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Sequence[Branch]:
        """attn_mask must broadcast over the heads."""
        require_one_mask(attn_mask)
        attn, mlp = block.attn, block.mlp
        project = partial(out_of_heads, attn.proj, "attn.proj", axes)
        contract = partial(out_of_heads, mlp.fc2, "mlp.fc2", axes)

        def mix(normed: Tensor, heads: Tensor) -> Tensor:
            samples, tokens, _ = normed.shape
            qkv = into_heads(attn.qkv, "attn.qkv", axes, normed, heads)
            query, key, value = (
                qkv.view(samples, tokens, 3, heads.numel(), -1).permute(2, 0, 3, 1, 4).unbind(0)
            )
            mixed = _attend(attn, query, key, value, attn_mask, is_causal)
            return mixed.transpose(1, 2).reshape(samples, tokens, -1)

        def end_attention(branch: Tensor) -> Tensor:
            ended: Tensor = block.drop_path1(block.ls1(attn.proj_drop(branch)))
            return ended

        def activate(normed: Tensor, heads: Tensor) -> Tensor:
            hidden: Tensor = mlp.drop1(mlp.act(into_heads(mlp.fc1, "mlp.fc1", axes, normed, heads)))
            return hidden

        def end_mlp(branch: Tensor) -> Tensor:
            ended: Tensor = block.drop_path2(block.ls2(mlp.drop2(branch)))
            return ended

        return (
            Branch(block.norm1, mix, project, attn.proj.bias, end_attention),
            Branch(block.norm2, activate, contract, mlp.fc2.bias, end_mlp),
        )

    def drops(self, block: Any) -> Drops:
        return Drops(
            {"attn.attn_drop": block.attn.attn_drop, "mlp.drop1": block.mlp.drop1},
            (block.attn.proj_drop, block.mlp.drop2),
            (block.drop_path1, block.drop_path2),
        )

    def set_heads(self, block: Any, heads: int) -> None:
        block.attn.num_heads = heads
        block.attn.attn_dim = heads * block.attn.head_dim

    def kernel_parts(self, block: Any) -> KernelParts | None:
        attn, mlp = block.attn, block.mlp
        linear, norms = (attn.qkv, attn.proj, mlp.fc1, mlp.fc2), (block.norm1, block.norm2)
        fits = (
            all(type(layer) is nn.Linear for layer in linear)
            and mlp.fc1.out_features % attn.num_heads == 0
            and all(
                isinstance(norm, nn.LayerNorm) and norm.weight is not None and norm.bias is not None
                for norm in norms
            )
            and type(mlp.act) is nn.GELU
            and mlp.act.approximate == "none"
            and all(type(end) in (nn.Identity, LayerScale) for end in (block.ls1, block.ls2))
            and all(
                isinstance(drop, nn.Identity | nn.Dropout | DropPath) and rate_of(drop) == 0
                for drop in (attn.proj_drop, mlp.drop1, mlp.drop2, block.drop_path1, block.drop_path2)
            )
        )
        if not fits:
            return None
        attend = partial(_attend, attn)
        return KernelParts(
            block.norm1, attn.qkv, attend, attn.proj, block.ls1, block.norm2, mlp.fc1, mlp.fc2, block.ls2
        )


def _attend(
    attn: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
) -> Tensor:
    """What the heads of module `attn` mix of the values; all [sample, head, token, channel]."""
    return F.scaled_dot_product_attention(
        attn.q_norm(query),
        attn.k_norm(key),
        value,
        attn_mask=attn_mask,
        dropout_p=attn.attn_drop.p if attn.training else 0.0,
        is_causal=is_causal,
        scale=attn.scale,
    )
