"""transformers' decoders: Llama, Qwen2 and Qwen3, which read text."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from d2ft_hpc.families.family import AnySize
from d2ft_hpc.families.transformers_models import TransformersFamily

MOST_COUNTED_TOKENS = 512
"""Length of the sequence whose FLOPs are counted; in longer ones attention has a slightly larger share."""


class TransformersDecoder(AnySize, TransformersFamily):
    """Embeddings that are tied to the language model's head lie below the blocks, and freeze with the others there."""

    supported = "transformers' Llama, Qwen2 and Qwen3"
    classes = (
        "llama.modeling_llama.LlamaModel",
        "qwen2.modeling_qwen2.Qwen2Model",
        "qwen3.modeling_qwen3.Qwen3Model",
    )
    takes_images = False
    blocks_path = "layers"
    attention = "self_attn"
    norms = ("input_layernorm", "post_attention_layernorm")
    names_below = ("embed_tokens",)

    def sample_shape(self, model: Any) -> tuple[int, ...]:
        return (min(int(model.config.max_position_embeddings), MOST_COUNTED_TOKENS),)

    def blank(self, model: Any, shape: tuple[int, ...]) -> Tensor:
        return torch.zeros(1, *shape, dtype=torch.long, device=next(model.parameters()).device)

    def size_of(self, samples: Tensor, shape: tuple[int, ...]) -> float:
        return samples.shape[1] / shape[0]

    # ---- images, which it has none of

    def tokens(self, model: Any, height: int, width: int) -> int:
        raise NotImplementedError

    def image_shape(self, model: Any) -> tuple[int, int, int] | None:
        return None

    def takes_other_sizes(self, model: Any) -> bool:
        return True

    def patch_size(self, model: Any) -> tuple[int, int]:
        raise NotImplementedError

    def embedding(self, model: Any) -> nn.Module | None:
        return None
