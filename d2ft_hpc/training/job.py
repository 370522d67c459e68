"""What a run trains, on one rank: data, model, executor and costs."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from timm.models.vision_transformer import VisionTransformer

from d2ft_hpc.config import RunConfig
from d2ft_hpc.data.datasets import LabelledImages, Split, load
from d2ft_hpc.data.sampler import MicroBatchSampler
from d2ft_hpc.execution.executor import PlanExecutor, attach
from d2ft_hpc.launch import Control
from d2ft_hpc.metering import StepCosts, measure_costs, meter
from d2ft_hpc.model.build import build_model
from d2ft_hpc.selection import SampleScorer, SampleSelection


@dataclass(frozen=True)
class Job:
    config: RunConfig
    control: Control
    device: torch.device
    model: VisionTransformer
    executor: PlanExecutor
    costs: StepCosts
    train_set: LabelledImages
    test_set: LabelledImages
    sampler: MicroBatchSampler
    selection: SampleSelection | None
    """What draws the samples that train; None where all of them do."""

    @property
    def total_steps(self) -> int:
        return self.config.train.epochs * self.sampler.batches_per_epoch

    @property
    def plan_shape(self) -> tuple[int, int, int]:
        """Rows, blocks, heads."""
        return (self.config.data.slots * self.control.world_size, *self.executor.subnets.shape)


def set_up(config: RunConfig, control: Control, device: torch.device) -> Job:
    """Makes a job's parts; no rank waits for another here, so that each can fail on its own."""
    random.seed(config.run.seed)
    np.random.seed(config.run.seed)
    torch.manual_seed(config.run.seed)
    train_set, test_set = _load_data(config, "train"), _load_data(config, "test")
    sampler = MicroBatchSampler(
        len(train_set),
        micro_batch_size=config.data.micro_batch_size,
        slots=config.data.slots,
        replicas=control.world_size,
        replica=control.rank,
        seed=config.run.seed,
    )
    model = build_model(
        config.model.name,
        num_classes=train_set.num_classes,
        weights=config.model.weights,
        options=config.model.options,
    ).to(device)
    executor = attach(
        model,
        embeddings=config.model.embeddings,
        shared=config.model.shared,
        compile=config.engine.compile,
    )
    image_shape = (3, config.data.image_size, config.data.image_size)
    costs = measure_costs(model, executor, image_shape)
    selection = None
    if config.plan.planner == "samples":
        scorer = _scorer(config, model)
        selection = SampleSelection(
            scorer,
            uniform_share=config.plan.samples.uniform_share,
            weights=config.plan.samples.weights,
            seed=config.run.seed,
            replica=control.rank,
        )
        with meter() as metered:
            scorer(
                torch.zeros(1, *image_shape, device=device), torch.zeros(1, device=device, dtype=torch.long)
            )
        costs = replace(costs, score_flops=metered.flops)
    return Job(config, control, device, model, executor, costs, train_set, test_set, sampler, selection)


def _scorer(config: RunConfig, model: VisionTransformer) -> SampleScorer:
    patch_size = model.patch_embed.patch_size[0]
    half = -(-config.data.image_size // (2 * patch_size)) * patch_size
    return SampleScorer(
        model,
        config.plan.samples.image_size or half,
        score=config.plan.samples.score,
        autocast_dtype={"bf16": torch.bfloat16, "fp16": torch.float16}.get(config.engine.precision),
    )


def _load_data(config: RunConfig, split: Split) -> LabelledImages:
    settings = config.data
    return load(
        settings.name,
        image_size=settings.image_size,
        split=split,
        root=None if settings.root is None else Path(settings.root),
        classes=settings.classes,
    )
