"""How fast the twelve matrix products of a block run for so many heads, on a GPU in bf16:

    python -m analysis.step.products


A line: model and micro-batch, heads; ms of all products, and with the faster form of each weight gradient; both a head;
TFLOP/s of each product. dx: the gradient of its input; dw: of its weight; T: the same transposed.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from analysis.step.timed import milliseconds

# tokens, channels, heads, hidden units of the FFN, numbers of heads tried
SIZES = {
    "B128": (128 * 197, 768, 12, 3072, (4, 5, 6, 7, 8, 9, 12)),
    "L64": (64 * 197, 1024, 16, 4096, (6, 7, 8, 9, 10, 11, 12, 16)),
    "g64": (64 * 257, 1408, 16, 6144, (8, 9, 10, 12, 16)),
    "S128": (128 * 197, 384, 6, 1536, (2, 3, 4, 6)),
}


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.bfloat16, device="cuda")


def line(name: str, heads: int) -> str:
    tokens, channels, of, units, _ = SIZES[name]
    size, units = channels // of, units // of
    milliseconds_of, rates = {}, {}
    for layer, width, into_heads in (
        ("qkv", 3 * heads * size, True),
        ("proj", heads * size, False),
        ("fc1", heads * units, True),
        ("fc2", heads * units, False),
    ):
        inner, outer = (channels, width) if into_heads else (width, channels)
        x, g, weight = normal(tokens, inner), normal(tokens, outer), normal(outer, inner)
        bias = normal(outer) if into_heads else None
        for form, function in {
            "": partial(F.linear, x, weight, bias),
            "dx_": partial(torch.matmul, g, weight),
            "dw_": partial(torch.matmul, g.t(), x),
            "T_": partial(torch.matmul, x.t(), g),
        }.items():
            milliseconds_of[form + layer] = milliseconds(function, 30)
            rates[form + layer] = 2e-9 * tokens * inner * outer / milliseconds_of[form + layer]
    total = sum(ms for key, ms in milliseconds_of.items() if not key.startswith("T_"))
    best = total - sum(
        max(0.0, milliseconds_of["dw_" + key[2:]] - ms)
        for key, ms in milliseconds_of.items()
        if key[:2] == "T_"
    )
    rest = " ".join(f"{key}:{rate:.0f}" for key, rate in rates.items())
    return f"{name} {heads} sum {total:.3f} best {best:.3f} ms a head {total / heads:.4f} {best / heads:.4f} {rest}"


if __name__ == "__main__":
    for name, (*_, tried) in SIZES.items():
        for heads in tried:
            print(line(name, heads), flush=True)
