"""What we use of DeepSpeed beyond its documented interface, all in one place."""

from __future__ import annotations

import contextlib
import io
from typing import Any

from d2ft_hpc.parallel.layout import Layout


def grid_of(layout: Layout) -> Any:
    """DeepSpeed's process groups for a layout, which serve it as `mpu`; on all ranks together."""
    from deepspeed.runtime.pipe.topology import PipelineParallelGrid

    with contextlib.redirect_stdout(io.StringIO()):  # it prints the coordinates of every rank
        return PipelineParallelGrid(topology=topology_of(layout))


def topology_of(layout: Layout) -> Any:
    from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology

    return PipeModelDataParallelTopology(
        num_pp=layout.stages, num_mp=layout.tensor_ranks, num_dp=layout.replicas
    )


def loss_of_replica(pipeline_engine: Any) -> float:
    """Mean loss of the micro-batches that `train_batch` just ran in this replica; known on every stage."""
    return float(pipeline_engine.dp_group_loss)
