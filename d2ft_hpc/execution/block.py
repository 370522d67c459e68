"""One transformer block under a plan: FULL, FORWARD_ONLY and SHORTCUT heads (arXiv 2504.12471, section 3).

For input x, FULL heads F, FORWARD_ONLY heads O and sg = stop-gradient:

    x' = x  + ls1(sum_{h in F} A_h(norm1 x)  + sg(sum_{h in O} A_h(norm1 x))  + b_proj)
    y  = x' + ls2(sum_{h in F} M_h(norm2 x') + sg(sum_{h in O} M_h(norm2 x')) + b_fc2)

A_h and M_h are a head's attention through its columns of `proj` and its FFN slice through its columns of `fc2`.
With no head active a branch is the identity. With no FULL head nothing of the block gets a gradient, while the
residual stays on the autograd graph. What is skipped is not computed and not stored.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import Tensor

from d2ft_hpc.execution.head_linear import head_linear, head_part
from d2ft_hpc.execution.lora import with_lora
from d2ft_hpc.model.subnets import HeadAxis

HeadAxes = dict[str, HeadAxis]


@dataclass(frozen=True)
class BlockHeads:
    """The heads that one block runs for one micro-batch: int64 on the model's device.

    order: [n], those that run, side by side: FULL ones first, either kind rising. num_full: how many are FULL.
    places: [head], each FULL head's place in `order`, -1 for the others.
    scale: what the branches add is multiplied by it.
    """

    order: Tensor
    num_full: int
    places: Tensor
    scale: float = field(default=1.0, kw_only=True)

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
    def shape(self) -> tuple[int, int, float]:
        """Heads that are FULL, heads that are FORWARD_ONLY, and the scale: what kernels are made for."""
        return self.num_full, self.num_forward_only, self.scale

    @property
    def is_dense(self) -> bool:
        """All heads are FULL and nothing is scaled: the block's own forward runs, bit for bit."""
        return self.num_full == self.places.numel() and self.scale == 1

    @property
    def is_shortcut(self) -> bool:
        return self.order.numel() == 0

    @property
    def trains(self) -> bool:
        """Parameters of the block take gradients."""
        return self.num_full > 0


def run_block(
    block: Block,
    x: Tensor,
    heads: BlockHeads,
    head_axes: HeadAxes,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
) -> Tensor:
    """Runs a block that is neither dense nor a shortcut.

    x: [sample, token, channel]; returns the same shape and dtype. attn_mask must broadcast over the heads.
    """
    if attn_mask is not None and attn_mask.dim() > 3 and attn_mask.shape[1] > 1:
        raise ValueError("an attention mask that differs between heads is not supported under a plan")

    def attend(normed: Tensor, chosen: Tensor, bias: Tensor | None) -> Tensor:
        return attention_heads(block, head_axes, normed, chosen, bias, attn_mask, is_causal)

    def feed_forward(normed: Tensor, chosen: Tensor, bias: Tensor | None) -> Tensor:
        return ffn_slices(block, head_axes, normed, chosen, bias)

    end_attention, end_feed_forward = branch_ends(block, heads.scale)
    x = x + _branch(x, heads, block.norm1, attend, block.attn.proj.bias, end_attention)
    return x + _branch(x, heads, block.norm2, feed_forward, block.mlp.fc2.bias, end_feed_forward)


def branch_ends(
    block: Block, scale: float = 1.0
) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """What a block does with the sum over heads before it is added to the residual: of attention, and of the FFN.

    scale: a factor at the very end.
    """

    def end_attention(branch: Tensor) -> Tensor:
        ended: Tensor = block.drop_path1(block.ls1(block.attn.proj_drop(branch)))
        return ended if scale == 1 else ended * scale

    def end_feed_forward(branch: Tensor) -> Tensor:
        ended: Tensor = block.drop_path2(block.ls2(block.mlp.drop2(branch)))
        return ended if scale == 1 else ended * scale

    return end_attention, end_feed_forward


def _branch(
    x: Tensor,
    heads: BlockHeads,
    norm: Callable[[Tensor], Tensor],
    compute: Callable[[Tensor, Tensor, Tensor | None], Tensor],
    bias: Tensor | None,
    end: Callable[[Tensor], Tensor],
) -> Tensor:
    """A residual branch: `compute` for each set of heads, their sum through `end`."""
    full, forward_only = heads.full, heads.forward_only
    if full is None:
        assert forward_only is not None
        with torch.no_grad():
            # Detached, because autocast would cache a copy of a leaf parameter that carries no gradient.
            return end(compute(norm(x), forward_only, None if bias is None else bias.detach()))
    normed = norm(x)
    branch = compute(normed, full, bias)
    if forward_only is not None:
        with torch.no_grad():
            branch.add_(compute(normed, forward_only, None))
    return end(branch)


def attention_heads(
    block: Block,
    head_axes: HeadAxes,
    normed: Tensor,
    heads: Tensor,
    bias: Tensor | None,
    attn_mask: Tensor | None,
    is_causal: bool,
) -> Tensor:
    """Sum of the heads' attention outputs through `proj`, plus `bias`; [sample, token, channel]."""
    attn = block.attn
    samples, tokens, _ = normed.shape
    qkv_bias = None if attn.qkv.bias is None else head_part(head_axes["attn.qkv.bias"], attn.qkv.bias, heads)
    qkv = head_linear(head_axes["attn.qkv.weight"], normed, attn.qkv.weight, qkv_bias, heads)
    qkv = with_lora(attn.qkv, "attn.qkv", head_axes, normed, heads, qkv)
    query, key, value = qkv.view(samples, tokens, 3, heads.numel(), -1).permute(2, 0, 3, 1, 4).unbind(0)
    mixed = attended(attn, query, key, value, attn_mask, is_causal)
    mixed = mixed.transpose(1, 2).reshape(samples, tokens, -1)
    projected = head_linear(head_axes["attn.proj.weight"], mixed, attn.proj.weight, bias, heads)
    return with_lora(attn.proj, "attn.proj", head_axes, mixed, heads, projected)


def attended(
    attn: Any, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, is_causal: bool
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


def ffn_slices(
    block: Block, head_axes: HeadAxes, normed: Tensor, heads: Tensor, bias: Tensor | None
) -> Tensor:
    """Sum of the heads' FFN slices through `fc2`, plus `bias`; [sample, token, channel]."""
    mlp = block.mlp
    fc1_bias = None if mlp.fc1.bias is None else head_part(head_axes["mlp.fc1.bias"], mlp.fc1.bias, heads)
    hidden = head_linear(head_axes["mlp.fc1.weight"], normed, mlp.fc1.weight, fc1_bias, heads)
    hidden = mlp.drop1(mlp.act(with_lora(mlp.fc1, "mlp.fc1", head_axes, normed, heads, hidden)))
    output = head_linear(head_axes["mlp.fc2.weight"], hidden, mlp.fc2.weight, bias, heads)
    return with_lora(mlp.fc2, "mlp.fc2", head_axes, hidden, heads, output)
