"""The configuration of a run: a YAML file plus dotted overrides onto a strict schema.

Single fields are checked by their types and ranges, relations between fields in `RunConfig`; both before any rank
starts work. Every message names the key, the value and, for an unknown key, the nearest valid one.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic_core import PydanticCustomError

from d2ft_hpc.config_faults import explain
from d2ft_hpc.config_file import Scalar, plain, read_tree, to_yaml
from d2ft_hpc.engines.deepspeed_keys import deepspeed_sections, unknown_keys, zero_stage
from d2ft_hpc.engines.kinds.kind import EngineKind
from d2ft_hpc.engines.kinds.table import ENGINES
from d2ft_hpc.errors import ConfigError
from d2ft_hpc.interval import Interval, interval_text
from d2ft_hpc.plan_config import PlanConfig
from d2ft_hpc.planning.communication_volume import DataParallel
from d2ft_hpc.safe_text import shown
from d2ft_hpc.settings import LONGEST, Fraction, PathText, Section, Seed, one_of

_LEAST_ALPHA, _MOST_ALPHA = 1e-3, 1000
"""A smaller one is 0 in float32, where the distribution does not exist."""


class RunSection(Section):
    name: str = Field(default="run", max_length=120)
    """Name of the run and of its folder. It may hold letters, digits, _, - and ., and does not begin with - or ."""
    folder: PathText = "runs"
    """The folder in which each run gets its own folder."""
    seed: Seed = 0
    """Everything that is drawn at random follows from it: new weights, the order of the images, their augmentation."""

    @field_validator("name")
    @classmethod
    def _check_name(cls, name: str) -> str:
        if not re.fullmatch(r"\w[\w.-]*", name):
            raise PydanticCustomError(
                "no_name", "use letters, digits, _, - and . alone, and begin with a letter, a digit or _"
            )
        return name


class LoraSection(Section):
    """Low-rank adaptation of the blocks' linear layers; all else but the classifier is frozen. Needs peft."""

    rank: int = Field(default=8, gt=0)
    """Rank of the two matrices that are trained for each layer."""
    alpha: int = Field(default=16, gt=0)
    """The low-rank product is multiplied by alpha / rank. A larger alpha stabilises large ranks (arXiv 2312.03732)."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout rate of the low-rank product's input."""


MIXING = {"mixup_alpha", "cutmix_alpha"}


class ModelConfig(Section):
    name: str
    """The model's name in timm. `d2ft-hpc models` lists those that are supported."""
    weights: PathText | None = None
    """Where the weights come from: a safetensors file in timm's names, or a folder with one. "pretrained" takes those
    that the model's name stands for, and "hf-hub:OWNER/NAME" others, both from the hub or, with HF_HUB_OFFLINE=1, from
    its cache. null: random weights."""
    options: dict[str, Any] = Field(default={})
    """Further keyword arguments of timm.create_model (img_size, drop_path_rate, ...)."""
    lora: LoraSection | None = None
    """null: the weights themselves are trained."""
    embeddings: Literal["frozen", "complete_path", "trained"] = "frozen"
    """Whether the parameters below all blocks are trained: patch embedding, positions and tokens. Every skip above
    them biases their gradient. frozen: they are not trained. complete_path: only by micro-batches that skip nothing.
    trained: by all micro-batches."""


class DataConfig(Section):
    name: Literal[
        "digits",
        "cifar10",
        "cifar100",
        "stanford_cars",
        "image_folder",
        "huggingface",
        "webdataset",
        "packed",
    ]
    """The data set, or the format of your own (d2ft_hpc/data/README.md)."""
    root: PathText | None = None
    """The folder of the data set, or the file if it is packed. Bundled data sets need none."""
    image_size: int = Field(default=32, gt=0)
    """Height and width of the images that the model gets, in pixels."""
    classes: Annotated[list[int], Field(min_length=1)] | None = None
    """The classes to keep. They become 0, 1, ... in this order. null: all classes."""
    validation_fraction: float = Field(default=0.0, ge=0, lt=1)
    """Share of the training set that is held out, to choose settings on. If it is above 0, evaluation uses these images
    and not the test images."""
    train_fraction: Fraction = 1.0
    """Share of the remaining training images that is used for training. Both shares have the same part of every class,
    and run.seed decides which images they hold."""
    augment: Literal["auto", "none", "shift", "resized_crop", "timm"] = "auto"
    """How training images are augmented. none: not at all. shift: they are shifted by up to an eighth and flipped.
    resized_crop: crops of 50 to 100 % of the area, flipped. timm: timm.data.create_transform. auto: none for digits,
    shift where the stored images have up to 64 x 64 pixels, else resized_crop."""
    timm: dict[str, Any] = Field(default={})
    """Options in timm's names. mixup_alpha and cutmix_alpha turn on Mixup and CutMix and are the alpha of
    Beta(alpha, alpha); with both, each micro-batch gets one of the two. With augment=timm also the options of
    timm.data.create_transform, such as auto_augment, color_jitter and re_prob."""
    micro_batch_size: int = Field(gt=0)
    """Number of samples of one micro-batch on one replica."""
    slots: int = Field(gt=0)
    """Number of micro-batches that a replica accumulates for each optimizer step."""
    workers: int | None = Field(default=None, ge=0, le=1024)
    """Number of processes that read and decode images for each rank. null: if a GPU trains and images have to be
    decoded, as many as the host's cores and /dev/shm allow, at most 16. Otherwise none."""

    @field_validator("classes", mode="before")
    @classmethod
    def _check_classes(cls, classes: Any) -> Any:
        numbers = isinstance(classes, list) and all(str(each).isdecimal() for each in classes)
        if not (classes is None or numbers):
            raise ValueError(
                "classes are told by their numbers in the data set, from 0; write [0, 3] or null"
            )
        return classes

    @model_validator(mode="after")
    def _check_timm(self) -> DataConfig:
        for name in sorted(MIXING & self.timm.keys()):
            alpha = self.timm[name]
            is_number = isinstance(alpha, int | float) and not isinstance(alpha, bool)
            if not is_number or not (alpha == 0 or _LEAST_ALPHA <= alpha <= _MOST_ALPHA):
                raise ValueError(
                    f"data.timm.{name}={shown(alpha)}: input should be 0, or from {_LEAST_ALPHA} to {_MOST_ALPHA}"
                )
        if self.transform_options and self.augment != "timm":
            raise ValueError(
                f"data.timm: {', '.join(self.transform_options)}: not read with data.augment={self.augment}; "
                f"remove it, or data.augment=timm"
            )
        return self

    @property
    def transform_options(self) -> dict[str, Any]:
        """Those of `timm` that are for timm.data.create_transform."""
        return {name: value for name, value in self.timm.items() if name not in MIXING}

    @property
    def mixing_options(self) -> dict[str, float]:
        """Those of `timm` that are for `Mixing`."""
        return {name: float(value) for name, value in self.timm.items() if name in MIXING}

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height, width."""
        return (3, self.image_size, self.image_size)

    @property
    def evaluated_split(self) -> Literal["test", "validation"]:
        return "validation" if self.validation_fraction > 0 else "test"


class OptimizerConfig(Section):
    name: Literal["adamw", "sgd"] = "adamw"
    """The optimizer."""
    learning_rate: float = Field(gt=0)
    """The highest learning rate. It is reached after the warm-up."""
    weight_decay: float = Field(default=0.05, ge=0)
    """Weight decay of matrices. Biases, norms and other vectors do not decay."""
    epsilon: float = Field(default=1e-8, gt=0)
    """What AdamW adds to the root of the second moment. Its betas are 0.9 and 0.999. SGD has a momentum of 0.9."""
    classifier_factor: float = Field(default=1.0, gt=0)
    """The classifier's learning rate divided by that of the other parameters. A new classifier learns best at a rate
    near 3e-3, which is a factor of 100 if pretrained weights are tuned at 2.8e-5 (analysis/tokens)."""
    warmup_share: float = Field(default=0.0, ge=0, lt=1)
    """Share of all steps in which the learning rate rises linearly. After them it falls linearly to zero."""


def _steps_of(text: str) -> range:
    """Empty if it names none."""
    found = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", text)
    first = int(found[1]) if found else 0
    return range(first, int((found and found[2]) or first) + 1) if first else range(0)


class TrainConfig(Section):
    epochs: int = Field(gt=0)
    """Number of passes over the training set."""
    steps_share: Fraction | Literal["auto"] = "auto"
    """Share of the epochs' steps that are run. The learning-rate schedule ends with the last of them, and
    plan.compute_budget is a share of what they cost: 0.8 of the steps at 0.5 are 0.4 of the dense compute. auto: all of
    them; but from ten epochs on planner `tokens` spends a plan.compute_budget below 0.6, here a share of all steps'
    cost, on fewer steps of larger images: 0.4 on 0.8 of them, 0.3 on 0.7."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """Share of each label that is spread evenly over all classes."""
    evaluate_every_epochs: int = Field(default=1, gt=0)
    """Number of epochs between two evaluations."""
    evaluate_at_start: bool = True
    """Whether the model is also evaluated before its first step."""
    checkpoint_every: str | None = "10 minutes"
    """How often a checkpoint is saved, in minutes, epochs or steps. null: only when a run is stopped. The newest two
    checkpoints are kept."""
    resume: bool | Literal["auto"] = False
    """true: continue the run in its folder from its newest checkpoint. auto: continue if there is a checkpoint, start
    if there is none. A run that is finished ends at once. Jobs with auto may be started again at any time."""

    trace_steps: str | None = None
    """Steps that each rank traces with torch's profiler, such as '20' or '20-24', counted from 1. The traces are
    written into the run's folder, and Perfetto or chrome://tracing shows them."""

    @field_validator("trace_steps")
    @classmethod
    def _check_trace(cls, text: str | None) -> str | None:
        if text is not None and not _steps_of(text):
            raise PydanticCustomError("no_steps", "write one step or the first and the last, such as '20-24'")
        return text

    @property
    def traced(self) -> range | None:
        """The steps to trace, counted from 1."""
        return None if self.trace_steps is None else _steps_of(self.trace_steps)

    @field_validator("checkpoint_every", mode="before")
    @classmethod
    def _check_interval(cls, text: Any) -> Any:
        return interval_text(text, "minutes, epochs or steps, such as '10 minutes' or '50 steps'")

    @property
    def checkpoint_interval(self) -> Interval | None:
        return None if self.checkpoint_every is None else Interval.read(self.checkpoint_every)


class EngineConfig(Section):
    name: str = Field(
        default="deepspeed", description="\n".join(f"{kind.name}: {kind.about}." for kind in ENGINES.values())
    )
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: the GPU where there is one."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """The number format of forward and backward. fp16 needs DeepSpeed's ZeRO and a GPU."""
    gradient_clipping: float | None = Field(default=None, gt=0)
    """The gradient is scaled down to this norm where its own is larger. null: it is not clipped."""
    pipeline_stages: int = Field(default=1, ge=1)
    """Number of ranks in a pipeline, each of which holds neighbouring blocks of one replica. 1: no pipeline."""
    tensor_parallel: int = Field(default=1, ge=1)
    """Number of ranks that share each block of one replica, every rank with some of its heads. DeepSpeed's
    `tensor_parallel.autotp_size` in `engine.deepspeed` means the same."""
    head_placement: Literal["in_order", "spread"] = "in_order"
    """Which tensor-parallel rank holds which heads. in_order: neighbouring ones. spread: heads whose scores have the
    same sum on every rank. For that, scores are measured once before training."""
    token_layout: Literal["replicated", "sharded", "overlapped", "auto"] = "replicated"
    """What tensor-parallel ranks hold between branches. replicated: every token, with an all-reduce after each branch.
    sharded: each its own tokens; a branch's input goes only to ranks with an active head, and only those return partial
    sums, so that messages follow the plan. overlapped: as sharded, by halves of a micro-batch: the messages of one are
    under way while the other is computed. auto: whichever is predicted to be fastest, for each plan."""
    activation_checkpointing: bool = False
    """Whether only each block's input is kept, and the block runs again in the backward, under the same plan."""
    deepspeed: dict[str, Any] = Field(default={})
    """Further settings for DeepSpeed, in its own names."""
    compile: bool = False
    """Whether torch.compile makes kernels: of dense blocks, of those that skip heads where these have at most 8 shapes
    (planner `static`) and no kernels of our own fit (they do on a GPU, without dropout and LoRA), and of what lies
    outside the blocks, where nothing hooks into it (ZeRO 3 does)."""
    cuda_graphs: bool | None = None
    """On a GPU, where ranks hold the whole model: whether what a micro-batch runs is launched as CUDA graphs, where a
    plan's micro-batches have at most 8 shapes. It pays where the GPU waits for the processor, as for small images.
    Engine `plain`: a micro-batch's forward and backward, and the scoring, are one graph each. The others: each block's
    forward and its backward, and the engine reduces as always. null: for planners that make few shapes (`tokens`,
    `samples`, `static`, `dense`), without ZeRO 3, offloading, fp16 and recomputation."""

    @field_validator("deepspeed")
    @classmethod
    def _check_sections(cls, settings: dict[str, Any]) -> dict[str, Any]:
        settings = deepspeed_sections(settings, "engine.deepspeed.")
        unknown = list(unknown_keys(settings, "engine.deepspeed."))
        if unknown:
            raise ValueError("\n".join(unknown))
        return settings

    @field_validator("name")
    @classmethod
    def _check_name(cls, name: str) -> str:
        return one_of(ENGINES, name)

    @property
    def kind(self) -> EngineKind:
        """What the engine can run."""
        return ENGINES[self.name]

    @property
    def data_parallel(self) -> DataParallel:
        """How replicas reduce (`planning.communication_volume`)."""
        return self.kind.data_parallel(self)

    @property
    def is_cut(self) -> bool:
        """Whether each rank holds a part of the model."""
        return self.pipeline_stages * self.tensor_ranks > 1

    @property
    def parts(self) -> str:
        """The keys and values that say so, for messages."""
        return f"engine.pipeline_stages={self.pipeline_stages}, engine.tensor_parallel={self.tensor_ranks}"

    @property
    def zero_stage(self) -> Any:
        """ZeRO's stage as `deepspeed` says; where it does not 0, or 1 under fp16."""
        return zero_stage(self.deepspeed, self.precision)

    @property
    def tensor_ranks(self) -> int:
        """Tensor-parallel ranks of a replica, whichever key says so."""
        return int(self.deepspeed.get("tensor_parallel", {}).get("autotp_size", 0)) or self.tensor_parallel


class LaunchConfig(Section):
    timeout_seconds: float = Field(default=25.0, gt=0, le=LONGEST)
    """How many seconds ranks wait for each other at the start and whenever they agree on something."""
    stop_signals: list[str] = Field(default=["USR2", "TERM"])
    """At one of these signals all ranks save after the current step and end with status 75. Started again with
    train.resume=auto, the run goes on from there."""
    silence_seconds: float = Field(default=30.0, ge=2, le=LONGEST)
    """After so many seconds without a sign of life a rank counts as lost, because it was stopped or its node is down. A
    rank that was killed is noticed at once."""
    stall_seconds: float = Field(default=600.0, gt=0, le=LONGEST)
    """If nothing moves on for so many seconds on any rank (a step, a batch of an evaluation, the set-up, a save), the
    ranks that hang are named and the run ends with status 75."""


class ResultsConfig(Section):
    file_per_rank: bool = False
    """Whether each rank writes its own figures to results.ranks/, which results.h5 joins. Meant for thousands of
    ranks."""
    tensorboard: bool = False
    """Whether files for TensorBoard are written, too, into the folder tensorboard/ of the run."""


class RunConfig(Section):
    """Everything that decides a run."""

    run: RunSection = RunSection()
    model: ModelConfig
    data: DataConfig
    optimizer: OptimizerConfig
    train: TrainConfig
    plan: PlanConfig = PlanConfig()
    engine: EngineConfig = EngineConfig()
    launch: LaunchConfig = LaunchConfig()
    results: ResultsConfig = ResultsConfig()

    @model_validator(mode="after")
    def _check_relations(self) -> RunConfig:
        scored_at = getattr(self.plan.options, "image_size", None)
        if scored_at is not None and scored_at > self.data.image_size:
            raise ValueError(
                f"plan.options.image_size={scored_at}: samples are scored at no higher resolution than they are "
                f"trained on, data.image_size={self.data.image_size}; use less, or null"
            )
        self.engine.kind.check(self)
        return self

    @property
    def steps_share(self) -> float:
        """train.steps_share, as a number."""
        share = self.train.steps_share
        return self.plan.steps_share(self.train.epochs) if share == "auto" else share

    @property
    def launches_graphs(self) -> bool:
        """Whether CUDA graphs are made on a GPU."""
        engine = self.engine
        if engine.cuda_graphs is not None:
            return engine.cuda_graphs
        zero = engine.deepspeed.get("zero_optimization", {})
        is_special = (
            engine.is_cut
            or engine.precision == "fp16"
            or engine.activation_checkpointing
            or engine.zero_stage == 3
            or any(key.startswith("offload_") for key in zero)
        )
        return self.plan.entry.makes_few_shapes and not is_special

    @property
    def plans_by_free_memory(self) -> bool:
        """Whether plans keep to the memory that is measured at the start."""
        return (
            self.plan.entry.fits_memory
            and self.plan.file is None
            and self.plan.memory_budget is None
            and not self.engine.activation_checkpointing  # a block's activations are there for its backward alone
        )

    @property
    def run_folder(self) -> Path:
        return Path(self.run.folder) / self.run.name

    def to_yaml(self) -> str:
        """The effective configuration, every default filled in."""
        return to_yaml(self.model_dump())


def read_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Reads a YAML file and applies overrides such as `plan.compute_budget=0.5`.

    A top-level `base: OTHER.yaml`, a path from the file's own folder, takes everything from there that the file does
    not set itself.

    Raises ConfigError with one line a fault.
    """
    tree = read_tree(path, overrides)
    try:
        return RunConfig.model_validate(plain(tree))
    except ValidationError as error:
        faults = error
    texts = [fault["loc"] for fault in faults.errors() if fault["type"] in _TEXT_EXPECTED]
    if sum(_take_text(tree, location) for location in texts):
        try:
            return RunConfig.model_validate(plain(tree))
        except ValidationError as error:
            faults = error
    raise ConfigError("\n".join(explain(faults, RunConfig))) from None


_TEXT_EXPECTED = ("string_type", "literal_error")


def _take_text(tree: Any, path: Sequence[str | int]) -> bool:
    """Puts the text in the place of a bool, number or null that is to be one; whether there was one."""
    for part in path:
        if isinstance(tree, dict) and part in tree:
            place: Any = part
        elif isinstance(tree, list) and isinstance(part, int):
            place = part
        else:
            return False
        if isinstance(tree[place], Scalar):
            tree[place] = tree[place].text
            return True
        tree = tree[place]
    return False
