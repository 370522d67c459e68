"""Where a run's subnets are placed: pipeline stages by measured cost, heads in order or by their scores."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from d2ft_hpc.engines.model_parallel import PLACEMENT
from d2ft_hpc.errors import CheckpointError
from d2ft_hpc.launch import agreed, share
from d2ft_hpc.launch.watch import Watch
from d2ft_hpc.parallel.head_split import even_owner
from d2ft_hpc.parallel.rank_layout import Placement
from d2ft_hpc.parallel.stages import cut_stages
from d2ft_hpc.planning import Budgets, Devices, pose
from d2ft_hpc.planning import place as place_heads
from d2ft_hpc.training.job import Job
from d2ft_hpc.training.probe_scores import measure_scores


def place(job: Job, checkpoint: Path | None, watch: Watch) -> Placement:
    """All ranks call it together and return the same. A resumed run keeps the placement of its checkpoint where it
    has as many stages and tensor-parallel ranks.

    Raises ConfigError or PlanError where the model has too few blocks or heads.
    """
    config, layout = job.config, job.layout
    _ = job.layer_flops  # counted before an engine spreads the weights
    with agreed(job.control, "placing the model's parts"):
        if checkpoint is not None and layout.is_cut:
            saved = checkpoint / PLACEMENT
            if saved.exists() and (placement := Placement.read(saved, layout)).fits:
                if placement.owner.shape != job.executor.subnets.shape:
                    raise CheckpointError(
                        f"{saved}: places {placement.owner.shape} blocks and heads, not this model's"
                    )
                return placement
        placed = place_in_order(job)
    stages, owner = placed.stages, placed.owner
    if config.engine.head_placement == "spread" and layout.tensor_ranks > 1:
        scores = measure_scores(job, job.model, job.loss, watch)
        if scores is not None:
            problem = pose(
                [scores.forward, scores.backward],
                job.costs,
                Budgets(config.plan.compute_budget),
                Devices(layout.replicas, owner),
            )

            def solve() -> bytes:
                return place_heads(problem, layout.tensor_ranks).astype("<i8").tobytes()

            # Rank 0 alone does it, since each rank would be stopped elsewhere by the time limit.
            owner = np.frombuffer(share(job.control, solve, "the heads' places"), "<i8").reshape(owner.shape)
    return Placement(layout, stages, owner)


def place_in_order(job: Job) -> Placement:
    """Stages by cost, neighbouring heads together. Raises ConfigError or PlanError as `place`."""
    stages = cut_stages(job.layer_flops, job.layout.stages)
    return Placement(job.layout, stages, even_owner(*job.executor.subnets.shape, job.layout.tensor_ranks))
