"""transformers' decoders: Llama, Qwen2 and Qwen3, which read text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2ft_hpc.families.family import NO_TARGET, AnySize
from d2ft_hpc.families.transformers_models import TransformersFamily

MOST_COUNTED_TOKENS = 512
"""Length of the sequence whose FLOPs are counted; those of others follow from it (`StepCosts.relative`)."""


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

    def excerpt(self, text: Mapping[str, Tensor]) -> tuple[Mapping[str, Tensor], Tensor]:
        """Neighbouring tokens from the beginning, if all are to be learnt; else half of them lie before the first that
        is, so that the answer to a prompt is scored where it begins, with the prompt's end."""
        labels = text["labels"]
        tokens = labels.shape[1]
        length = max(tokens // 4, 1)
        is_text = text.get("attention_mask", torch.ones_like(labels)) != 0
        targets = F.pad(labels[:, 1:], (0, 1), value=NO_TARGET).where(is_text, NO_TARGET)
        first, first_target = (which.byte().argmax(1) for which in (is_text, targets != NO_TARGET))
        start = (first_target - length // 2).maximum(first).clamp_max(tokens - length)
        places = start[:, None] + torch.arange(length, device=labels.device)
        rows = torch.arange(len(labels), device=labels.device)[:, None]
        inputs = {name: value[rows, places] for name, value in text.items() if name != "labels"}
        return inputs, targets[rows, places]

    # ---- images, which it has none of

    def image_shape(self, model: Any) -> tuple[int, int, int] | None:
        return None

    def embedding(self, model: Any) -> nn.Module | None:
        return None
