"""`d2ft-hpc bench step` with other ways to train less beside the plan.

python -m analysis.step.peers --model vit_base_patch16_224 --micro-batch 128 --forward-only 0.2
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable
from functools import partial
from typing import Any

import timm
import torch
from torch import Tensor, nn

from d2ft_hpc.bench.step import Contender, Sizes, batch_of, benchmark, contender, describe
from d2ft_hpc.errors import ConfigError
from d2ft_hpc.families.table import family_of
from d2ft_hpc.model.lora import add_lora


def peers(sizes: Sizes, dense: nn.Module, skipped: float) -> dict[str, Contender]:
    """Other ways to train less, at the same share of branches that get no gradient; LoRA of rank 8."""
    batch = batch_of(sizes, sizes.micro_batch)

    def contend(model: nn.Module) -> Contender:
        return contender(torch.compile(model, dynamic=False), model, batch, sizes)

    subset = copy.deepcopy(dense)
    keep = max(1, round((1 - skipped) * sizes.micro_batch))
    for block in family_of(subset).blocks(subset):
        block.forward = _subset_forward(block, keep)
    dropped = timm.create_model(
        sizes.model, img_size=sizes.image_size, num_classes=1000, drop_path_rate=skipped
    )
    dropped = dropped.to(device=sizes.device, dtype=sizes.dtype).train()
    found = {"subset_stochastic_depth": contend(subset), "timm_drop_path": contend(dropped)}
    adapted = copy.deepcopy(dense)
    try:
        add_lora(adapted, rank=8, alpha=16, dropout=0.0)
    except ConfigError:  # peft is an optional extra
        return found
    return found | {"peft_lora": contend(adapted.to(sizes.dtype))}


def _subset_forward(block: Any, keep: int) -> Callable[[Tensor], Tensor]:
    """Each branch runs on a random subset of the samples, scaled up (DINOv2's stochastic depth, arXiv 2304.07193)."""

    branches: tuple[Callable[[Tensor], Tensor], ...] = (
        lambda x: block.ls1(block.attn(block.norm1(x))),
        lambda x: block.ls2(block.mlp(block.norm2(x))),
    )

    def forward(x: Tensor) -> Tensor:
        for branch in branches:
            chosen = torch.rand(x.shape[0], device=x.device).argsort()[:keep]
            x = x.index_add(0, chosen, branch(x[chosen]), alpha=x.shape[0] / keep)
        return x

    return forward


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="vit_small_patch16_224")
    parser.add_argument("--micro-batch", type=int, default=16)
    parser.add_argument("--compute", type=float, default=0.6)
    parser.add_argument("--forward-only", type=float, default=0.0)
    options = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    sizes = Sizes(
        **vars(options),
        heads_multiple=None,
        lora_rank=None,
        plan=None,
        image_size=224,
        device=torch.device("cuda" if on_gpu else "cpu"),
        dtype=torch.bfloat16 if on_gpu else torch.float32,
        repeats=None,
    )
    found = benchmark(sizes, beside=partial(peers, sizes))
    print(describe(found))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
