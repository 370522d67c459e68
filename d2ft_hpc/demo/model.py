"""The demo's vision transformer, known to timm as `vit_digits_demo` once this module is imported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn

DEMO_WEIGHTS = Path(__file__).with_name("vit_digits.safetensors")

default_cfgs = generate_default_cfgs(
    {
        "vit_digits_demo": {
            "file": str(DEMO_WEIGHTS),
            "num_classes": 0,  # the file has no classifier: timm then makes a new one of any size
            "input_size": (3, 32, 32),
            "mean": (0.5, 0.5, 0.5),
            "std": (0.5, 0.5, 0.5),
            "first_conv": "patch_embed.proj",
            "classifier": "head",
            "license": "apache-2.0",
        }
    }
)


@register_model  # type: ignore[untyped-decorator]
def vit_digits_demo(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """A ViT for 32x32 images: 6 blocks of 4 heads, width 128, 65 tokens (4x4 patches and cls), 1.2 M weights.

    `pretrained` loads DEMO_WEIGHTS (digits 0-4, by analysis/demo/pretrain.py); other arguments go to VisionTransformer.
    """
    size = {"img_size": 32, "patch_size": 4, "embed_dim": 128, "depth": 6, "num_heads": 4}
    model: VisionTransformer = build_model_with_cfg(
        VisionTransformer,
        "vit_digits_demo",
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,  # resamples positions for other image sizes
        **{**size, **kwargs},
    )
    return model
