"""Attaches plans to a model of a known family: from now on its blocks follow an executor."""

from __future__ import annotations

import weakref
from functools import partial
from typing import Any, cast

from torch import nn
from torch.distributed.fsdp import FSDPModule

from d2ft_hpc.errors import ConfigError, PlanError, UnsupportedModelError
from d2ft_hpc.execution.absent import fill_absent_gradients
from d2ft_hpc.execution.compilation import compile_outside_blocks
from d2ft_hpc.execution.executor import BlockLink, EmbeddingPolicy, PlanExecutor
from d2ft_hpc.families.family import BlockFamily
from d2ft_hpc.families.table import backbone_of
from d2ft_hpc.model.subnets import ParameterClass, SubnetMap


def attach(
    model: Any,
    *,
    embeddings: EmbeddingPolicy = "frozen",
    compile: bool = False,
    cuda_graphs: bool = False,
) -> PlanExecutor:
    """Lets a model of one of the families (`d2ft_hpc.families`), or the one inside peft's wrapper or a module of one's
    own, follow skip plans.

    embeddings: what becomes of the parameters below every block, whose gradient is biased by every skip above them:
        "frozen" (default), "complete_path" (trained by the micro-batches that are FULL everywhere) or "trained".
    compile: whether torch.compile makes kernels, one set for each shape: of dense blocks, of those that skip heads
        under plans with few shapes (`PlanExecutor.block_shapes`), and of what lies outside the blocks.
    cuda_graphs: whether, on a GPU, a block's forward and its backward are one launch each, for up to 8 shapes of
        micro-batches; further ones, and a forward that begins while an earlier one waits for its backward, run without.
    The classifier always trains; parameters that are frozen already stay so.

    Raises UnsupportedModelError where the model cannot be cut by head, ConfigError where FSDP2 has it already.
    """
    model = backbone_of(model)
    if any(isinstance(module, FSDPModule) for module in model.modules()):
        raise ConfigError(
            "fully_shard was called before attach, which has to see whole weights: call attach first, then fully_shard"
        )
    subnets = SubnetMap.of(model)
    blocks = subnets.blocks(model)
    if any(hasattr(block, "_d2ft") for block in blocks):
        raise PlanError("the model has an executor already: attach once and keep what attach returned")
    for module in filter(None, (*blocks, subnets.family.embedding(model))):
        if "forward" in vars(module):
            name = next(name for name, each in model.named_modules() if each is module)
            raise UnsupportedModelError(
                f"{name} has a forward that was set on the module, not on its class, in whose place attach sets "
                f"another: set it after attach"
            )
    executor = PlanExecutor(
        subnets,
        embeddings,
        compile,
        cuda_graphs,
        partial(_recomputes, subnets.family, weakref.ref(model)),
    )
    for name, parameter in model.named_parameters():
        if embeddings == "frozen" and subnets.classify(name) is ParameterClass.EMBEDDING:
            parameter.requires_grad_(False)
            parameter.grad = None  # by which an optimizer that has it would go on
        if parameter.requires_grad and subnets.family.goes_beside(name):
            executor.trained_beside.append(name)
    for index, block in enumerate(blocks):
        executor.link(block, index)
    executor.images.link(model)
    if compile and subnets.family.composes(model):
        compile_outside_blocks(model, subnets.family, executor.images.scaled_before)
    fill_absent_gradients(model, partial(_skips, subnets))
    return executor


def _recomputes(family: BlockFamily, model: weakref.ref[Any]) -> bool:
    attached = model()
    return attached is not None and family.recomputes(attached)


def _skips(subnets: SubnetMap, model: nn.Module) -> bool:
    """Whether the attached model follows a plan by micro-batches."""
    link: BlockLink = cast(Any, subnets.blocks(model)[0])._d2ft
    return bool(link.executor.rows)
