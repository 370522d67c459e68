"""What a run trains, on one rank: data, model, executor and costs."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2ft_hpc.config import RunConfig
from d2ft_hpc.data.datasets import LabelledImages, Split, open_split
from d2ft_hpc.data.loader import EVALUATION_FACTOR, Batches, eval_loader, train_loader, workers_of
from d2ft_hpc.data.mixing import Mixing
from d2ft_hpc.data.sampler import MicroBatchSampler
from d2ft_hpc.engines.engine import MicroBatch
from d2ft_hpc.engines.private_names import newer_than_tested
from d2ft_hpc.errors import ConfigError, DataError
from d2ft_hpc.execution.attach import attach
from d2ft_hpc.execution.executor import PlanExecutor
from d2ft_hpc.families.table import family_of
from d2ft_hpc.launch import Control
from d2ft_hpc.launch.control import print_line
from d2ft_hpc.lifecycle.foresight import curve_of
from d2ft_hpc.metering import StepCosts, measure_costs
from d2ft_hpc.model.build import build_model, pixel_statistics
from d2ft_hpc.model.lora import add_lora
from d2ft_hpc.parallel.rank_layout import RankLayout
from d2ft_hpc.parallel.stages import layer_flops
from d2ft_hpc.planning.samples import SampleOptions
from d2ft_hpc.planning.token_curve import TokenCurve
from d2ft_hpc.safe_text import shown
from d2ft_hpc.selection import SampleSelection
from d2ft_hpc.selection.build import count_scoring, selection_of

_PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Job:
    config: RunConfig
    control: Control
    device: torch.device
    model: nn.Module
    executor: PlanExecutor
    costs: StepCosts
    train_set: LabelledImages
    evaluation_set: LabelledImages
    sampler: MicroBatchSampler
    layout: RankLayout
    patch_size: tuple[int, int]
    """Height and width, pixels."""
    selection: SampleSelection | None
    """What draws the samples that train; None where all of them do."""
    cores: float
    """This rank's, see `share_of_cores`."""

    @property
    def total_steps(self) -> int:
        all_steps = self.config.train.epochs * self.sampler.batches_per_epoch
        return max(round(all_steps * self.config.steps_share), 1)

    @property
    def num_epochs(self) -> int:
        """Epochs begun; the last may be cut short."""
        return math.ceil(self.total_steps / self.sampler.batches_per_epoch)

    @property
    def step_samples(self) -> list[int]:
        """Of each step, over all replicas."""
        return (self.sampler.batch_samples * self.num_epochs)[: self.total_steps]

    @property
    def share_of_epochs(self) -> float:
        """The share that the run's steps are of all its epochs', by samples."""
        return sum(self.step_samples) / (self.config.train.epochs * sum(self.sampler.batch_samples))

    def length_in_words(self, steps: int) -> str:
        """So many steps from the beginning in epochs, of which the last may be cut short."""
        epochs, cut = divmod(steps, self.sampler.batches_per_epoch)
        if cut:
            return f"{steps} steps ({steps / self.sampler.batches_per_epoch:.1f} epochs)"
        return f"{epochs} epoch{'s' * (epochs != 1)}"

    def steps_of_epoch(self, epoch: int) -> int:
        return min(self.sampler.batches_per_epoch, self.total_steps - epoch * self.sampler.batches_per_epoch)

    @cached_property
    def layer_flops(self) -> list[float]:
        """As `parallel.stages.layer_flops`, at the run's image size."""
        return layer_flops(self.model, self.costs, self.config.data.image_shape)

    @property
    def precision(self) -> torch.dtype:
        """In which forward and backward compute."""
        return _PRECISIONS[self.config.engine.precision]

    @cached_property
    def curve(self) -> TokenCurve | None:
        """The resolution of each step's images; None: they have full size, or the one that the plan says."""
        share = self.share_of_epochs if self.config.train.steps_share == "auto" else 1.0
        return curve_of(self.config.plan, self.costs, self.step_samples, "plan.", share)

    def share_of_tokens(self, step: int) -> float:
        """What a dense step on images of this step's size computes, over one on images of full size."""
        if self.curve is None:
            return 1.0
        return self.costs.at[self.curve.grid_at(step)].dense_flops / self.costs.dense_flops

    def _size_at(self, step: int) -> tuple[int, int]:
        assert self.curve is not None
        down, across = self.curve.grid_at(step)
        return down * self.patch_size[0], across * self.patch_size[1]

    @cached_property
    def data_workers(self) -> int:
        """Processes of this rank that read images."""
        ranks = self.control.hosts.count(self.control.host)
        return workers_of(self.config.data, self.train_set, self.device, self.cores, ranks)

    @cached_property
    def train_batches(self) -> Batches:
        """Micro-batches of this replica, in the sampler's order."""
        return train_loader(
            self.train_set,
            self.sampler,
            num_workers=self.data_workers,
            device=self.device,
            mixing=Mixing(self.train_set.num_classes, **self.config.data.mixing_options),
            size_at=None if self.curve is None else self._size_at,
        )

    def batches(self, micro_batches: Iterable[MicroBatch]) -> Iterator[list[MicroBatch]]:
        """Groups a loader's micro-batches into batches on the job's device, in slot order."""
        on_device = ((images.to(self.device), labels.to(self.device)) for images, labels in micro_batches)
        while batch := list(islice(on_device, self.config.data.slots)):
            yield batch

    @cached_property
    def evaluation_batches(self) -> Batches:
        """This replica's share of the evaluation images."""
        return eval_loader(
            self.evaluation_set,
            batch_size=EVALUATION_FACTOR * self.config.data.micro_batch_size,
            replicas=self.control.world_size,
            replica=self.control.rank,
            num_workers=self.data_workers,
            device=self.device,
        )

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy; labels int64 [sample], or float [sample, class] if they are mixed."""
        return F.cross_entropy(logits.float(), labels, label_smoothing=self.config.train.label_smoothing)

    @property
    def remarks(self) -> list[str]:
        """What people should know about data and model, a sentence each."""
        small, data, sampler = "", self.config.data, self.sampler
        untrained, model = "", self.config.model
        if model.weights is None and model.embeddings == "frozen":
            untrained = (
                "model.weights=null: all weights are random, and those below the blocks stay as they are, by "
                "model.embeddings=frozen; set model.weights, or model.embeddings=trained"
            )
        if sampler.batch_size > len(self.train_set):
            small = (
                f"data.micro_batch_size={data.micro_batch_size}: a batch of {sampler.rows} micro-batches would take "
                f"{sampler.batch_size} images, but there are {len(self.train_set)}, which make one smaller batch; use "
                f"at most {len(self.train_set) // sampler.rows}"
            )
        every = dict.fromkeys(
            [self.train_set.remark, self.evaluation_set.remark, self._absent_classes, small, untrained]
        )
        return [remark for remark in every if remark]

    @property
    def _absent_classes(self) -> str:
        """Says which classes have no training images, as where labels begin with 1; empty if there are none."""
        count = self.train_set.num_classes
        absent = sorted(set(range(count)) - set(self.train_set.labels))
        if not absent:
            return ""
        labels = ", ".join(map(str, absent[:8])) + ", ..." * (len(absent) > 8)
        return (
            f"data.root={self.config.data.root}: no training image is of {len(absent)} of the {count} classes (labels "
            f"{labels}), which cannot be learned; add images of them, or number the classes 0, 1, ... without a gap"
        )

    @property
    def plan_shape(self) -> tuple[int, int, int]:
        """Rows, blocks, heads."""
        return (self.config.data.slots * self.layout.replicas, *self.executor.subnets.shape)


def layout_of(config: RunConfig, control: Control) -> RankLayout:
    """This rank's part of the run. Raises ConfigError where the ranks cannot be divided as asked."""
    if control.world_size > 1 and config.engine.kind.is_one_process:
        raise ConfigError(
            f"engine.name={config.engine.name} trains in one process, and {control.world_size} ranks were started: set "
            f"engine.name to ddp, fsdp2 or deepspeed, or start one rank"
        )
    return RankLayout.of(
        control.world_size,
        control.rank,
        stages=config.engine.pipeline_stages,
        tensor_ranks=config.engine.tensor_ranks,
    )


def set_up(config: RunConfig, control: Control, device: torch.device, cores: float = 1.0) -> Job:
    """Makes a job's parts. No rank waits for another here, so that each can fail by itself."""
    layout = layout_of(config, control)
    if config.engine.precision == "fp16" and device.type == "cpu":
        raise ConfigError(
            "engine.precision=fp16: needs a GPU, and the run would take the CPU; set bf16, or start on a GPU node"
        )
    kind = config.engine.kind
    kind.prepare(config)
    if control.rank == 0:
        for warning in newer_than_tested(kind.libraries):
            print_line(f"d2ft-hpc: warning: {warning}")
    random.seed(config.run.seed)
    np.random.seed(config.run.seed)
    torch.manual_seed(config.run.seed)
    statistics = pixel_statistics(config.model.name, config.model.weights)
    train_set, evaluation_set, sampler = open_images(config, layout, *statistics)
    if control.rank == 0:
        for images in (train_set, evaluation_set):
            images.look_at_some()
    model = make_model(config, train_set.num_classes).to(device)
    executor = attach(
        model,
        embeddings=config.model.embeddings,
        compile=config.engine.compile,
        cuda_graphs=config.launches_graphs and not kind.graphs_micro_batches,
    )
    executor.images.may_come_scaled = config.plan.token_share is not None  # by `train_batches`
    image_shape = config.data.image_shape
    costs = measure_costs(model, executor, image_shape, config.plan.sides)
    selection = None
    if isinstance(config.plan.options, SampleOptions):
        selection = selection_of(
            config.plan.options,
            model,
            image_shape,
            seed=config.run.seed,
            replica=layout.replica,
            autocast_dtype=None
            if config.engine.precision == "fp32"
            else _PRECISIONS[config.engine.precision],
            cuda_graphs=config.launches_graphs and kind.graphs_micro_batches and device.type == "cuda",
        )
        costs = replace(costs, score_flops=count_scoring(selection, image_shape, device))
    return Job(
        config,
        control,
        device,
        model,
        executor,
        costs,
        train_set,
        evaluation_set,
        sampler,
        layout,
        executor.subnets.family.patch_size(model),
        selection,
        cores,
    )


def open_images(
    config: RunConfig,
    layout: RankLayout,
    mean: Sequence[float] = (0.5, 0.5, 0.5),
    std: Sequence[float] = (0.5, 0.5, 0.5),
) -> tuple[LabelledImages, LabelledImages, MicroBatchSampler]:
    """Images for training and for evaluation, see `open_split`, and the sampler of the former. Raises ConfigError or
    DataError where a run cannot train on them."""

    def of(split: Split) -> LabelledImages:
        return open_split(config.data, split, mean, std, seed=config.run.seed)

    train_set, evaluation_set = of("train"), of(config.data.evaluated_split)
    sampler = MicroBatchSampler(
        len(train_set),
        micro_batch_size=config.data.micro_batch_size,
        slots=config.data.slots,
        replicas=layout.replicas,
        replica=layout.replica,
        seed=config.run.seed,
    )
    _check_sizes(config, train_set, sampler)
    _check_classes(config, train_set, evaluation_set)
    return train_set, evaluation_set, sampler


def make_model(config: RunConfig, num_classes: int) -> nn.Module:
    """As `build_model`, with LoRA's factors where the run trains those. Raises ConfigError, too, where the model does
    not take the images."""
    model = build_model(
        config.model.name,
        num_classes=num_classes,
        weights=config.model.weights,
        options=config.model.options,
    )
    _check_image_size(model, config.data.image_size)
    if config.model.lora is not None:
        add_lora(model, **config.model.lora.model_dump())
    return model


def _check_sizes(config: RunConfig, train_set: LabelledImages, sampler: MicroBatchSampler) -> None:
    """Raises ConfigError where there is nothing to learn, or fewer images than a batch needs."""
    data, images = config.data, len(train_set)
    if train_set.num_classes < 2:
        raise ConfigError(
            f"data.name={data.name}: all images are of one class, which teaches nothing; add images of another class "
            f"(data.root, data.classes)"
        )
    if data.micro_batch_size > images:
        raise ConfigError(
            f"data.micro_batch_size={data.micro_batch_size}: there are {images} training images; use at most "
            f"{images // sampler.rows}, which is what each of the {sampler.rows} micro-batches of a batch would get"
        )


def _check_classes(config: RunConfig, train_set: LabelledImages, evaluation_set: LabelledImages) -> None:
    """Raises DataError where a label does not mean the same in both; classes without images may be absent in one."""
    where, evaluated = f"data.root={config.data.root}", f"the {config.data.evaluated_split} images"
    for label, names in enumerate(zip(train_set.class_names, evaluation_set.class_names, strict=False)):
        if names[0] != names[1]:
            raise DataError(
                f"{where}: class {label} is {shown(names[0])} in the training images and {shown(names[1])} in "
                f"{evaluated}; both need the same classes in the same order"
            )
    if (most := max(evaluation_set.labels)) >= train_set.num_classes:
        raise DataError(
            f"{where}: {evaluated} have label {most}, and the training images {train_set.num_classes} classes, counted "
            f"from 0; both need the same classes"
        )


def _check_image_size(model: nn.Module, size: int) -> None:
    family = family_of(model)
    shape = family.image_shape(model)
    if shape is not None and not family.takes_other_sizes(model) and shape[1:] != (size, size):
        _, height, width = shape
        high, wide = family.patch_size(model)
        whole = max(1, round(size / math.lcm(high, wide))) * math.lcm(high, wide)
        cut = (
            ""
            if whole == size
            else f" in patches of {high} x {wide}, and {size} holds no whole number of them"
        )
        both = "" if whole == height else f", or both data.image_size and model.options.img_size to {whole}"
        raise ConfigError(
            f"data.image_size={size}: the model takes {height} x {width} pixels{cut}; set "
            f"data.image_size={height}{both}"
        )
