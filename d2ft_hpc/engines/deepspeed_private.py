"""Every use of what DeepSpeed does not document: an upgrade breaks one file, and its test names what is gone."""

from __future__ import annotations

import contextlib
import io
import os
from typing import Any

import torch
from torch import nn

from d2ft_hpc.parallel.layout import Layout

SURFACE = (
    "deepspeed.ops:__compatible_ops__",
    "deepspeed.runtime.engine:DeepSpeedEngine.gradient_accumulation_steps",
    "deepspeed.runtime.engine:DeepSpeedEngine.is_gradient_accumulation_boundary",
    "deepspeed.runtime.engine:DeepSpeedEngine.zero_optimization_stage",
    "deepspeed.runtime.pipe.topology:PipeModelDataParallelTopology",
    "deepspeed.runtime.pipe.topology:PipelineParallelGrid.get_slice_parallel_group",
    "deepspeed.runtime.pipe.module:PipelineModule.mpu",
)
"""What is used here and in this package beyond DeepSpeed's documentation, as module:attribute."""


def import_deepspeed() -> Any:
    """DeepSpeed, quiet, and without the minute that its first use on a CPU would spend on compiling an all-reduce."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    import deepspeed
    import deepspeed.ops

    if "deepspeed_shm_comm" in deepspeed.ops.__compatible_ops__:
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def current_slot(engine: Any) -> int:
    """The place in its batch of the micro-batch that runs forward or backward."""
    return int(engine.micro_steps % engine.gradient_accumulation_steps())


def loss_scale(engine: Any) -> float:
    """What `engine.backward` multiplies a loss by, gradient accumulation included."""
    scale = (
        getattr(engine.optimizer, "cur_scale", None) or getattr(engine.optimizer, "loss_scale", None) or 1.0
    )
    return float(scale) / int(engine.gradient_accumulation_steps())


def full_state(model: nn.Module) -> dict[str, torch.Tensor]:
    raise NotImplementedError


def grid_of(layout: Layout) -> Any:
    """DeepSpeed's process groups for a layout, which serve it as `mpu`; on all ranks together."""
    from deepspeed.runtime.pipe.topology import PipelineParallelGrid

    with contextlib.redirect_stdout(io.StringIO()):  # it prints the coordinates of every rank
        return PipelineParallelGrid(topology=topology_of(layout))


def topology_of(layout: Layout) -> Any:
    """DeepSpeed's description of a layout."""
    from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology

    return PipeModelDataParallelTopology(
        num_pp=layout.stages, num_mp=layout.tensor_ranks, num_dp=layout.replicas
    )


def loss_of_replica(pipeline_engine: Any) -> float:
    """Mean loss of the micro-batches that `train_batch` just ran in this replica; known on every stage."""
    return float(pipeline_engine.dp_group_loss)
