"""A slow, obviously right forward pass of a model under a plan row: one head at a time, plain autograd."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor

SHORTCUT, FORWARD_ONLY, FULL = 0, 1, 2


def reference_forward(model: VisionTransformer, images: Tensor, operations: np.ndarray) -> Tensor:
    """Logits of `model` (never attached to an executor) where block b, head h runs operations[b, h]."""
    x = model.patch_embed(images)
    x = model._pos_embed(x)
    x = model.norm_pre(model.patch_drop(x))
    for block, row in zip(model.blocks, operations, strict=True):
        x = reference_block(block, x, row)
    return model.forward_head(model.norm(x))


def reference_block(block: Block, x: Tensor, row: np.ndarray) -> Tensor:
    def attend(z: Tensor, head: int) -> Tensor:
        return attention_head(block, z, head)

    x = _residual(x, row, block.norm1, attend, block.attn.proj.bias, block.ls1)
    return _residual(
        x,
        row,
        block.norm2,
        lambda z, h: ffn_slice(block, z, h),
        block.mlp.fc2.bias,
        block.ls2,
    )


def _residual(x, row, norm, head_output, bias, scale):
    if (row == SHORTCUT).all():
        return x
    total = torch.zeros_like(x)
    for head, operation in enumerate(row):
        if operation == FULL:
            total = total + head_output(norm(x), head)
        elif operation == FORWARD_ONLY:
            total = total + head_output(norm(x), head).detach()
    if bias is not None:
        total = total + bias
    branch = scale(total)
    return x + (branch if (row == FULL).any() else branch.detach())


def attention_head(block: Block, z: Tensor, head: int) -> Tensor:
    """One head's attention through its columns of proj."""
    attn, heads = block.attn, block.attn.num_heads
    dim = attn.qkv.out_features // (3 * heads)
    projected = []
    for part in range(3):
        rows = slice((part * heads + head) * dim, (part * heads + head + 1) * dim)
        projected.append(
            F.linear(z, attn.qkv.weight[rows], None if attn.qkv.bias is None else attn.qkv.bias[rows])
        )
    query, key, value = attn.q_norm(projected[0]), attn.k_norm(projected[1]), projected[2]
    weights = (query * dim**-0.5 @ key.transpose(-2, -1)).softmax(-1)
    return F.linear(weights @ value, attn.proj.weight[:, head * dim : (head + 1) * dim])


def ffn_slice(block: Block, z: Tensor, head: int) -> Tensor:
    """One head's slice of the FFN through its columns of fc2."""
    mlp, heads = block.mlp, block.attn.num_heads
    units = mlp.fc1.out_features
    own = slice(head * units // heads, (head + 1) * units // heads)
    hidden = mlp.act(F.linear(z, mlp.fc1.weight[own], None if mlp.fc1.bias is None else mlp.fc1.bias[own]))
    return F.linear(hidden, mlp.fc2.weight[:, own])
