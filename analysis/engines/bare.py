"""DeepSpeed's engines as they are used without us: what overhead is measured against."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from d2ft_hpc.engines.deepspeed_private import import_deepspeed, topology_of
from d2ft_hpc.engines.engine import LossFunction, MicroBatch
from d2ft_hpc.errors import ConfigError
from d2ft_hpc.parallel.rank_layout import Placement

Step = Callable[[Sequence[MicroBatch]], object]


def frozen_below(model: VisionTransformer) -> VisionTransformer:
    """The model with what `attach` freezes frozen, and nothing else done to it."""
    for name, parameter in model.named_parameters():
        if name.startswith(("patch_embed", "pos_embed", "cls_token", "reg_token", "norm_pre")):
            parameter.requires_grad_(False)
    return model


def bare_engine(
    model: VisionTransformer,
    placement: Placement,
    config: Mapping[str, Any],
    make_optimizer: Callable[[nn.Module], tuple[Optimizer, LRScheduler]],
    loss_function: LossFunction,
) -> Step:
    """One step of DeepSpeed's data parallelism, of its pipeline over the same stages, or of its AutoTP.

    model: never attached. Raises ConfigError for a pipeline with tensor parallelism and for heads that the ranks do not
    divide, which DeepSpeed alone cannot do.
    """
    layout = placement.layout
    if layout.stages > 1 and layout.tensor_ranks > 1:
        raise ConfigError(
            "overhead: DeepSpeed alone has no pipeline with tensor parallelism for timm's models to compare "
            "with; use --pipeline-stages or --tensor-parallel"
        )
    if layout.stages > 1:
        return _pipeline(model, placement, config, make_optimizer, loss_function)
    heads, width = model.blocks[0].attn.num_heads, model.embed_dim
    if heads % layout.tensor_ranks:
        raise ConfigError(
            f"overhead: DeepSpeed's AutoTP cuts equal parts, {heads} heads have none for {layout.tensor_ranks} "
            f"ranks; use another --model, such as vit_small_patch16_224 with 6 heads"
        )
    if layout.tensor_ranks > 1:
        config = {**config, "tensor_parallel": _autotp(layout.tensor_ranks)}
    optimizer, schedule = make_optimizer(model)
    engine, *_ = import_deepspeed().initialize(
        model=model,
        model_parameters=_trained(model),
        optimizer=optimizer,
        lr_scheduler=schedule,
        config=dict(config),
    )
    if layout.tensor_ranks > 1:
        for (
            block
        ) in engine.module.blocks:  # DeepSpeed cuts the weights, and these numbers in some releases only
            block.attn.num_heads = heads // layout.tensor_ranks
            block.attn.attn_dim = width // layout.tensor_ranks
    engine.train()
    dtype = next(engine.module.parameters()).dtype

    def step(micro_batches: Sequence[MicroBatch]) -> None:
        for images, labels in micro_batches:
            engine.backward(loss_function(engine(images.to(dtype)).float(), labels))
            engine.step()

    return step


def _autotp(ranks: int) -> dict[str, Any]:
    """DeepSpeed's own tensor parallelism for timm's blocks; it cuts equal parts only."""
    specs: list[dict[str, Any]] = [
        {
            "patterns": [r".*\.attn\.qkv\.weight$"],
            "partition_type": "column",
            "shape": [3, -1],
            "partition_dim": 0,
        },
        {"patterns": [r".*\.mlp\.fc1\.weight$"], "partition_type": "column"},
        {"patterns": [r".*\.attn\.proj\.weight$", r".*\.mlp\.fc2\.weight$"], "partition_type": "row"},
    ]
    return {"autotp_size": ranks, "partition_config": {"use_default_specs": False, "layer_specs": specs}}


def _pipeline(
    model: VisionTransformer,
    placement: Placement,
    config: Mapping[str, Any],
    make_optimizer: Callable[[nn.Module], tuple[Optimizer, LRScheduler]],
    loss_function: LossFunction,
) -> Step:
    deepspeed = import_deepspeed()
    from deepspeed.pipe import LayerSpec, PipelineModule

    with contextlib.redirect_stdout(io.StringIO()):  # DeepSpeed prints its cut
        module = PipelineModule(
            [LayerSpec(_Stage, model, blocks) for blocks in placement.stages],
            topology=topology_of(placement.layout),
            loss_fn=loss_function,
            partition_method="uniform",
            dynamic_shape=True,
        )
    (stage,) = (child for child in module.children() if isinstance(child, _Stage))
    optimizer, schedule = make_optimizer(stage)
    engine, *_ = deepspeed.initialize(
        model=module,
        model_parameters=_trained(stage),
        optimizer=optimizer,
        lr_scheduler=schedule,
        config=dict(config),
    )
    dtype = next(stage.parameters()).dtype

    def step(micro_batches: Sequence[MicroBatch]) -> None:
        engine.train_batch(iter([(images.to(dtype), labels) for images, labels in micro_batches]))

    return step


class _Stage(nn.Module):
    """Neighbouring blocks of a model, with what lies below the first or above the last."""

    def __init__(self, model: VisionTransformer, blocks: range) -> None:
        super().__init__()
        all_blocks = list(model.blocks)
        self.below = _Below(model) if blocks.start == 0 else nn.Identity()
        self.blocks = nn.Sequential(*all_blocks[blocks.start : blocks.stop])
        self.above = _Above(model) if blocks.stop == len(all_blocks) else nn.Identity()

    def get_classifier(self) -> nn.Module:
        return self.above.head if isinstance(self.above, _Above) else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.above(self.blocks(self.below(x)))
        return result


class _Below(nn.Module):
    def __init__(self, model: VisionTransformer) -> None:
        super().__init__()
        self.patch_embed, self.pos_embed, self.cls_token = model.patch_embed, model.pos_embed, model.cls_token

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch_embed(images)
        embedded: Tensor = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embed
        return embedded


class _Above(nn.Module):
    def __init__(self, model: VisionTransformer) -> None:
        super().__init__()
        self.norm, self.head = model.norm, model.head

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.norm(x)[:, 0])
        return logits


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]
