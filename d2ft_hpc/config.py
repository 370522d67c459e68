"""The configuration of a run: a YAML file plus dotted overrides onto a strict schema.

Single fields are checked by their types and ranges, relations between fields in `RunConfig`; both before any rank
starts work. Every message names the key, the value and, for an unknown key, the nearest valid one.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    ValidationError,
    field_validator,
    model_validator,
)
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

_LEAST_ALPHA = 1e-3


class RunSection(Section):
    name: str = Field(default="run", max_length=120)
    """Name of the run and of its folder: letters, digits, _, - and ., the first of them no - or ."""
    folder: PathText = "runs"
    """Where run folders are made."""
    seed: Seed = 0
    """Decides everything that is drawn at random: random weights, the order of the images, their augmentation."""

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
    """Rank of the matrices that are trained."""
    alpha: int = Field(default=16, gt=0)
    """The low-rank product counts alpha / rank times; a larger alpha stabilises large ranks (arXiv 2312.03732)."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Of what the low-rank product gets."""


MIXING = {"mixup_alpha", "cutmix_alpha"}


def _is_alpha(alpha: float) -> bool:
    """A smaller one is 0 in float32, where the distribution does not exist."""
    return alpha == 0 or _LEAST_ALPHA <= alpha <= 1000


class ModelConfig(Section):
    name: str
    """timm's name of a model of one of the families (d2ft_hpc/families)."""
    weights: PathText | None = None
    """A safetensors file in timm's names or a folder with one; "pretrained" for those that the model's name stands for,
    "hf-hub:OWNER/NAME" for others, both from the hub or (HF_HUB_OFFLINE=1) its cache; null for random ones."""
    options: dict[str, Any] = Field(default={})
    """Further keyword arguments of timm.create_model (img_size, drop_path_rate, ...)."""
    lora: LoraSection | None = None
    """null: the weights themselves are trained."""
    embeddings: Literal["frozen", "complete_path", "trained"] = "frozen"
    """Parameters below every block, whose gradient is biased by each skip above them: frozen, trained by the
    micro-batches that are FULL everywhere, or trained by all."""


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
    """Folder of the data set, for those that are not bundled; for packed ones the file."""
    image_size: int = Field(default=32, gt=0)
    """Height and width that the model sees, pixels."""
    classes: Annotated[list[int], Field(min_length=1)] | None = None
    """Classes to keep, relabelled 0, 1, ...; null for all."""
    validation_fraction: float = Field(default=0.0, ge=0, lt=1)
    """Share of the training set that is held out of it, to choose settings on: evaluation is then on these images. 0:
    evaluation is on the test images."""
    train_fraction: Fraction = 1.0
    """Share of the rest of the training set that is trained on. Both shares are stratified by class; run.seed says
    which images they are."""
    augment: Literal["auto", "none", "shift", "resized_crop", "timm"] = "auto"
    """Of training images. shift: by up to an eighth, and flips; resized_crop: crops of 50 to 100 % of the area, and
    flips; timm: timm.data.create_transform. auto: none for digits, shift for small images (up to 64 x 64 pixels), else
    resized_crop."""
    timm: dict[str, Any] = Field(default={})
    """timm's options: mixup_alpha and cutmix_alpha of timm.data.Mixup, the alpha of Beta(alpha, alpha), where 0 is none
    and each micro-batch takes one of two; and, for augment=timm, those of timm.data.create_transform (auto_augment,
    color_jitter, re_prob, ...)."""
    micro_batch_size: int = Field(gt=0)
    """Samples of one micro-batch."""
    slots: int = Field(gt=0)
    """Micro-batches of one replica in a batch."""
    workers: int | None = Field(default=None, ge=0, le=1024)
    """Processes of each rank that read and decode. null: where a GPU trains and images are decoded, as many as the
    host's cores and /dev/shm allow, up to 16; else none."""

    @model_validator(mode="after")
    def _check_timm(self) -> DataConfig:
        for name in sorted(MIXING & self.timm.keys()):
            alpha = self.timm[name]
            if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not _is_alpha(alpha):
                raise ValueError(
                    f"data.timm.{name}={shown(alpha)}: input should be 0, or from {_LEAST_ALPHA} to 1000"
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
    def evaluated_split(self) -> Literal["test", "validation"]:
        return "validation" if self.validation_fraction > 0 else "test"


class OptimizerConfig(Section):
    name: Literal["adamw", "sgd"] = "adamw"
    """The optimizer."""
    learning_rate: float = Field(gt=0)
    """Highest learning rate, which is reached after the warm-up."""
    weight_decay: float = Field(default=0.05, ge=0)
    """Of matrices; biases, norms and other vectors do not decay."""
    epsilon: float = Field(default=1e-8, gt=0)
    """AdamW's, added to the root of the second moment. Its betas are 0.9 and 0.999, SGD's momentum 0.9."""
    classifier_factor: float = Field(default=1.0, gt=0)
    """The classifier's learning rate in multiples of the others'. A new classifier learns best at a rate near
    3e-3: with pretrained weights tuned at 2.8e-5, a factor of 100 (analysis/tokens)."""
    warmup_share: float = Field(default=0.0, ge=0, lt=1)
    """Share of all steps in which the learning rate rises linearly, before it falls to zero in a line."""


def _steps_of(text: str) -> range:
    """Empty if it names none."""
    found = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", text)
    first = int(found[1]) if found else 0
    return range(first, int((found and found[2]) or first) + 1) if first else range(0)


class TrainConfig(Section):
    epochs: int = Field(gt=0)
    """Passes over the training set."""
    steps_share: Fraction = 1.0
    """Share of the epochs' steps that are run; the learning-rate schedule ends with them."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """Share of each label that is spread evenly over all classes."""
    evaluate_every_epochs: int = Field(default=1, gt=0)
    """How many epochs lie between two evaluations."""
    evaluate_at_start: bool = True
    """Whether the model is evaluated before its first step too."""
    checkpoint_every: str | None = "10 minutes"
    """How often a checkpoint is saved: so many minutes, epochs or steps; null: never, but where a run is stopped. The
    newest two stay."""
    resume: bool | Literal["auto"] = False
    """true: continue the run in its folder from its newest checkpoint. auto: the same where there is one, start where
    there is none, and end at once if the run is finished: for jobs that may be started again at any time."""

    trace_steps: str | None = None
    """Steps that each rank traces with torch's profiler, into the run's folder, for Perfetto or chrome://tracing:
    such as '20' or '20-24', counted from 1."""

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
    """In which forward and backward are computed; fp16 needs DeepSpeed's ZeRO and a GPU."""
    gradient_clipping: float | None = Field(default=None, gt=0)
    """Largest norm of the gradient; null: no clipping."""
    pipeline_stages: int = Field(default=1, ge=1)
    """Ranks that each hold neighbouring blocks of one replica; 1: no pipeline."""
    tensor_parallel: int = Field(default=1, ge=1)
    """Ranks that share each block of one replica by its heads. DeepSpeed's `tensor_parallel.autotp_size` in
    `engine.deepspeed` says the same."""
    head_placement: Literal["in_order", "spread"] = "in_order"
    """Which tensor-parallel rank holds which heads: neighbouring ones, or such that by their scores each rank's are
    worth the same, for which scores are measured once before training."""
    token_layout: Literal["replicated", "sharded", "overlapped", "auto"] = "replicated"
    """What tensor-parallel ranks hold between branches. replicated: every token, with an all-reduce after each branch.
    sharded: each its own tokens; a branch's input goes only to ranks with an active head, and only those return partial
    sums, so that messages follow the plan. overlapped: as sharded, by halves of a micro-batch: the messages of one are
    under way while the other is computed. auto: whichever is predicted to be fastest, for each plan."""
    activation_checkpointing: bool = False
    """Keep each block's input only and run the block again in the backward, under the same row of the plan."""
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
    `samples`, `static`, `dense`), without ZeRO 3, offloading, fp16 and recomputation, and not of blocks that get more
    than their input, such as rotary positions, except in engine `plain`."""

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
    """How long ranks wait for each other at the start and whenever they agree on something."""
    stop_signals: list[str] = Field(default=["USR2", "TERM"])
    """Signals upon which all ranks save at the next step boundary and end with status 75: start again to go on."""
    silence_seconds: float = Field(default=30.0, ge=2, le=LONGEST)
    """A rank that is not heard for so long is lost: stopped, or its node is down. A killed one is noticed at once."""
    stall_seconds: float = Field(default=600.0, gt=0, le=LONGEST)
    """Longest time in which nothing moves on, on any rank (a step, a batch of an evaluation, the set-up, a save),
    before hung ranks are named and the run ends with status 75."""


class ResultsConfig(Section):
    locking: Literal["yes", "no", "best-effort"] = "best-effort"
    """Whether a lock keeps other processes from writing the same run; best-effort: where the file system has locks."""
    file_per_rank: bool = False
    """Each rank writes its own figures to results.ranks/, which results.h5 joins; for thousands of ranks."""
    tensorboard: bool = False
    """Also write TensorBoard's files, to the run's folder tensorboard/."""


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
