"""The configuration of a run: a YAML file plus dotted overrides onto a strict schema.

Single fields are checked by their types and ranges, relations between fields in `RunConfig`; both before any rank
starts work. Every message names the key, the value and, for an unknown key, the nearest valid one.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from inspect import isclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeGuard, TypeVar, get_args, get_origin

from pydantic import (
    AfterValidator,
    BaseModel,
    Field,
    SerializeAsAny,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError

from d2ft_hpc.config_file import Scalar, plain, read_tree, to_yaml
from d2ft_hpc.engines.deepspeed_keys import deepspeed_sections, unknown_keys, zero_stage
from d2ft_hpc.engines.kinds.kind import EngineKind
from d2ft_hpc.engines.kinds.table import ENGINES
from d2ft_hpc.errors import ConfigError
from d2ft_hpc.paths import expand
from d2ft_hpc.planning.communication_volume import DataParallel
from d2ft_hpc.planning.planner import Options, Planner
from d2ft_hpc.planning.table import PLANNERS
from d2ft_hpc.planning.tokens import TOKENS, TokenOptions
from d2ft_hpc.safe_text import shown
from d2ft_hpc.score_table import FISHER, SCORES, WEIGHT_MAGNITUDE
from d2ft_hpc.settings import Fraction, Section

PathText = Annotated[str, AfterValidator(expand)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
"""As numpy takes it."""
_LEAST_ALPHA = 1e-3
_LONGEST = 1e7
"""Of waiting times in seconds and minutes: what lies far beyond a job's life overflows clocks."""


Kind = TypeVar("Kind")
KindOfSection = TypeVar("KindOfSection", bound=Section)


def _either(names: Iterable[str], word: str = "or") -> str:
    """`a, b or c`."""
    *first, last = names
    return f"{', '.join(first)} {word} {last}" if first else last


def _one_of(table: Iterable[str], name: str) -> str:
    """The name, which must be in the table."""
    if name not in table:
        raise PydanticCustomError("unknown", "input should be {known}", {"known": _either(map(repr, table))})
    return name


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
    layers: list[Literal["qkv", "proj", "fc1", "fc2"]] = Field(
        default=["qkv", "proj", "fc1", "fc2"], min_length=1
    )
    """Linear layers of each block that get such matrices."""


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
    """Share of the training set that is held out of it, to choose settings on."""
    train_fraction: Fraction = 1.0
    """Share of the rest of the training set that is trained on."""
    split_seed: Seed = 0
    """Decides which images these two shares are; both are stratified by class."""
    evaluate_on: Literal["test", "validation"] = "test"
    """Choose settings on validation images, report on test images."""
    augment: Literal["auto", "none", "shift", "resized_crop", "timm"] = "auto"
    """Of training images. shift: by up to an eighth, and flips; resized_crop: crops of 50 to 100 % of the area, and
    flips; timm: timm.data.create_transform. auto: none for digits, shift for small images (up to 64 x 64 pixels), else
    resized_crop."""
    timm: dict[str, Any] = Field(default={})
    """Options of timm.data.create_transform (auto_augment, color_jitter, re_prob, ...) for augment=timm."""
    mixup_alpha: float = Field(default=0.0, ge=0, le=1000)
    """Mixup: alpha of Beta(alpha, alpha); 0: none. With CutMix on too, each micro-batch takes one of them."""
    cutmix_alpha: float = Field(default=0.0, ge=0, le=1000)
    """CutMix: the same."""
    micro_batch_size: int = Field(gt=0)
    """Samples of one micro-batch."""
    slots: int = Field(gt=0)
    """Micro-batches of one replica in a batch."""
    workers: int = Field(default=0, ge=0, le=1024)
    """Processes of each rank that read and decode; small packed images need none."""

    @field_validator("mixup_alpha", "cutmix_alpha")
    @classmethod
    def _check_alpha(cls, alpha: float) -> float:
        """A smaller one is 0 in float32, where the distribution does not exist."""
        if 0 < alpha < _LEAST_ALPHA:
            raise PydanticCustomError(
                "too_small", "input should be 0, or at least {least}", {"least": _LEAST_ALPHA}
            )
        return alpha


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


class Interval(NamedTuple):
    """So many minutes, or whole epochs or steps."""

    number: float
    unit: str
    """minute, epoch or step."""

    @staticmethod
    def read(text: str) -> Interval | None:
        """None if it is none."""
        found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(minute|epoch|step)s?", text)
        if not found:
            return None
        number, unit = float(found[1]), found[2]
        whole = unit == "minute" or number.is_integer()
        return Interval(number, unit) if whole and 0 < number <= _LONGEST else None


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
    """Steps of which each rank writes a trace by torch's profiler into the run's folder, for Perfetto or
    chrome://tracing: such as '20' or '20-24', counted from 1."""

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

    @field_validator("checkpoint_every")
    @classmethod
    def _check_interval(cls, text: str | None) -> str | None:
        if text is not None and Interval.read(text) is None:
            raise PydanticCustomError(
                "no_interval", "write so many minutes, epochs or steps, such as '10 minutes' or '50 steps'"
            )
        return text

    @property
    def checkpoint_interval(self) -> Interval | None:
        return None if self.checkpoint_every is None else Interval.read(self.checkpoint_every)


class ReplanConfig(Section):
    every: int | None = Field(default=None, gt=0)
    """A new plan is made after so many units; null: one plan for the whole run."""
    unit: Literal["steps", "epochs"] = "epochs"
    """What `every` counts."""
    overlap: bool = False
    """Solve while training goes on under the old plan. The first step under the new one depends on the clock and is
    recorded; if false, the step at which a plan is due waits for it."""
    speeds: Literal["start", "watched"] = "start"
    """What later plans take for the ranks' speeds: those of the first plan, or what each rank computed a second in the
    steps under the plan before, so that a rank that others slow down gets less. Watched ones depend on the clock: a
    resumed run may plan otherwise."""


class PlanConfig(Section):
    planner: str = Field(
        default=TOKENS.name,
        description="\n".join(f"{entry.name}: {entry.about}." for entry in PLANNERS.values()),
    )
    options: SerializeAsAny[Options] = Field(default_factory=Options, validate_default=True)
    """What only the chosen planner reads; the tables below list it for each planner that has options."""
    file: PathText | None = None
    """A saved plan (d2ft-hpc plan --save) to follow instead of making one; null: make one."""
    compute_budget: Fraction = 0.6
    """Share of the dense run's training FLOPs that each device may spend."""
    token_budget: Fraction | None = None
    """Share of the dense run's training FLOPs that images of lower resolution leave over the run: they begin small and
    end at data.image_size (`TokenOptions in d2ft_hpc/planning/tokens.py`). Planners by heads then keep compute_budget
    together with it; planner `tokens` has no other. null: all images have full size."""
    communication_budget: Fraction | None = None
    """Share of the dense run's messages between subnets; null: no limit."""
    messages: Literal["by_head", "by_meeting"] = "by_head"
    """What these messages are: by_head counts FULL 1 and FORWARD_ONLY 0.5 for every head (the paper's cost model),
    by_meeting what tensor-parallel ranks really send in engine.token_layout, which is less where only some of them, or
    none, have an active head in a block."""
    memory_budget: Fraction | None = None
    """Share of the activations of a dense micro-batch that a device keeps for the backward. null: planners that fit
    memory (`joint`, `makespan`, `depth`) keep to what each rank has left at the start, if it is too little for a dense
    micro-batch; 1: no limit. Others are refused where they exceed it."""
    costs: Literal["flops", "measured", "paper"] = "flops"
    """What planners take for the cost of FORWARD_ONLY and of what always runs: counted FLOPs; seconds of a short
    profile on every rank at the start (kept for the same hardware and model), which also gives the ranks' speeds; or
    the paper's constants."""
    device_speed: list[Annotated[float, Field(gt=0)]] | None = None
    """Relative speed of each rank, in place of the measured ones or of equal ones."""
    forward_score: str = Field(
        default=FISHER.name,
        description="What a subnet's forward gives to a micro-batch, as a sum over its weights w with gradients g:\n"
        + "\n".join(f"{score.name}: {score.about}." for score in SCORES.values()),
    )
    backward_score: str = WEIGHT_MAGNITUDE.name
    """The same for its backward."""
    probe_batches: int = Field(default=1, gt=0)
    """Batches over which scores are averaged; their cost is charged to the run."""
    time_limit_seconds: float = Field(default=10.0, gt=0, le=_LONGEST)
    """Of planners that search: after this the best plan so far, or the greedy one, is taken."""
    replan: ReplanConfig = ReplanConfig()

    @field_validator("planner")
    @classmethod
    def _check_planner(cls, name: str) -> str:
        return _one_of(PLANNERS, name)

    @field_validator("forward_score", "backward_score")
    @classmethod
    def _check_score(cls, name: str) -> str:
        return _one_of(SCORES, name)

    @field_validator("options", mode="before")
    @classmethod
    def _check_options(cls, given: Any, info: ValidationInfo) -> Any:
        """Reads them as the planner's own."""
        planner = PLANNERS.get(info.data.get("planner", ""))
        if planner is None:  # which is fault enough
            return Options()
        values = given.model_dump() if isinstance(given, Options) else given
        if not isinstance(values, dict):
            raise PydanticCustomError("no_options", "input should be a section of options")
        known = planner.options.model_fields
        if unknown := [name for name in values if name not in known]:
            raise PydanticCustomError(
                "unknown_option",
                "planner {planner} has no option {name}; {fix}",
                {
                    "planner": planner.name,
                    "name": unknown[0],
                    "fix": f"it knows {_either(known, 'and')}" if known else "it knows none: remove it",
                },
            )
        return planner.options.model_validate(values)

    @property
    def entry(self) -> Planner:
        """The planner itself."""
        return PLANNERS[self.planner]

    @property
    def token_share(self) -> float | None:
        """`token_budget`, or what it is for a planner that has no other; None: images have full size, or the one that a
        plan from a file says."""
        if self.file is not None:
            return None
        return self.compute_budget if self.entry.scales_images else self.token_budget

    @property
    def price(self) -> str:
        """What the planner's plans cost beside what they spare, a sentence; empty where they keep accuracy."""
        if not self.entry.keeps_budgets or self.entry.binding == "sample":
            return ""
        return (
            f"plan.planner={self.planner} skips heads, which cost 2 to 12 points of accuracy at 0.6 where it was "
            f"measured (analysis/paper_table, analysis/plan_structure); plan.planner=tokens is the one that keeps it"
        )

    @property
    def sides(self) -> list[float] | None:
        """Of images in training, in units of data.image_size; None: they have full size, or a plan from a file says."""
        if self.token_share is None:
            return None
        return self.options.sides if isinstance(self.options, TokenOptions) else TokenOptions().sides

    def arguments(self, *, seed: int | Sequence[int]) -> dict[str, Any]:
        """Keyword arguments of the planner's function. seed: of planners that draw."""
        return self.entry.arguments(self.options, seed=seed, time_limit_seconds=self.time_limit_seconds)

    @model_validator(mode="after")
    def _check_token_budget(self) -> PlanConfig:
        if self.token_budget is None:
            return self
        if self.entry.scales_images:
            raise ValueError(
                f"plan.token_budget={self.token_budget:g}: with plan.planner={self.planner} it is plan.compute_budget; "
                f"remove it"
            )
        if self.entry.binding == "sample" or self.file is not None:
            asked = f"plan.file={self.file}" if self.file is not None else f"plan.planner={self.planner}"
            raise ValueError(
                f"plan.token_budget={self.token_budget:g}: {asked} trains on images of full size; remove one of them"
            )
        if self.token_budget < self.compute_budget:
            raise ValueError(
                f"plan.token_budget={self.token_budget:g}: is below plan.compute_budget={self.compute_budget:g}, which "
                f"would leave the heads nothing to skip; use plan.planner=tokens, or a larger one"
            )
        return self


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
    cuda_graphs: bool = False
    """On a GPU, where ranks hold the whole model: whether what a micro-batch runs is launched as CUDA graphs, for
    planners whose micro-batches have at most 8 shapes (`static`, `samples`, `dense`, and others as it falls out). It
    pays where the GPU waits for the processor. Engine `plain`: a micro-batch's forward and backward, and the scoring,
    are one graph each. The others: each block's forward and its backward, and the engine reduces as always."""

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
        return _one_of(ENGINES, name)

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
    timeout_seconds: float = Field(default=25.0, gt=0, le=_LONGEST)
    """How long ranks wait for each other at the start and whenever they agree on something."""
    stop_signals: list[str] = Field(default=["USR2", "TERM"])
    """Signals upon which all ranks save at the next step boundary and end with status 75: start again to go on."""
    silence_seconds: float = Field(default=30.0, ge=2, le=_LONGEST)
    """A rank that is not heard for so long is lost: stopped, or its node is down. A killed one is noticed at once."""
    stall_seconds: float = Field(default=600.0, gt=0, le=_LONGEST)
    """Longest time in which nothing moves on, on any rank (a step, a batch of an evaluation, the set-up, a save),
    before hung ranks are named and the run ends with status 75."""


class ResultsConfig(Section):
    flush_seconds: float = Field(default=5.0, gt=0, le=_LONGEST)
    """Most that a killed run loses of its records."""
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
        if self.data.evaluate_on == "validation" and self.data.validation_fraction == 0:
            raise ValueError(
                "data.evaluate_on=validation: there are no validation images; set data.validation_fraction, such as 0.1"
            )
        if self.data.timm and self.data.augment != "timm":
            raise ValueError(
                f"data.timm: not read with data.augment={self.data.augment}; remove it, or data.augment=timm"
            )
        scored_at = getattr(self.plan.options, "image_size", None)
        if scored_at is not None and scored_at > self.data.image_size:
            raise ValueError(
                f"plan.options.image_size={scored_at}: samples are scored at no higher resolution than they are "
                f"trained on, data.image_size={self.data.image_size}; use less, or null"
            )
        self.engine.kind.check(self)
        return self

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


def load_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
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


def validated(schema: type[KindOfSection], values: Any, prefix: str = "") -> KindOfSection:
    """`values` as that section. Raises ConfigError with one line a fault; prefix: stands before its keys."""
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        raise ConfigError("\n".join(explain(error, schema, prefix))) from None


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


_IN_WORDS = dict.fromkeys(("model_type", "dict_type"), "holds settings of its own, {KEY: VALUE}")
"""For the types of pydantic's faults that it tells in words of Python."""


def explain(error: ValidationError, schema: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """One line for each fault: key, value, what is wrong, what would be right.

    schema: what was validated; prefix: stands before its keys, as in "d2ft.".
    """
    expected: dict[str, list[str]] = {}  # a value that may be one of several types fails as each
    for fault in error.errors():
        key = prefix + ".".join(_key_parts(fault["loc"], schema, unknown=fault["type"] == "extra_forbidden"))
        if fault["type"] == "extra_forbidden":
            yield f"{key}: unknown key (value {shown(fault['input'])}){_nearest(key, schema, prefix)}"
        elif fault["type"] == "missing":
            yield f"{key}: missing; set it in the file or as {key}=VALUE"
        elif not fault["loc"]:
            told = fault["msg"].removeprefix("Value error, ")
            yield (
                told
                if fault["type"] == "value_error"
                else f"{prefix}{shown(fault['input'])}: holds no settings"
            )
        else:
            told = _IN_WORDS.get(fault["type"], fault["msg"].removeprefix("Value error, "))
            if told.startswith(f"{key}."):  # it names a key inside
                yield told
                continue
            expected.setdefault(f"{key}={shown(fault['input'])}", []).append(f"{told[0].lower()}{told[1:]}")
    for value, told_of in expected.items():
        yield f"{value}: {', or '.join(told_of)}"


def _key_parts(
    location: Sequence[str | int], schema: type[BaseModel] | None, *, unknown: bool
) -> Iterator[str]:
    """A fault's place without the names of the types that were tried there."""
    for part in location:
        fields = _fields(schema)
        if part not in fields and not isinstance(part, int) and not unknown:
            return
        yield str(part)
        schema = section_of(fields[str(part)].annotation) if part in fields else None


def _fields(schema: type[BaseModel] | None) -> Mapping[str, FieldInfo]:
    """The keys of a section; of the one for a planner's options, those of all planners."""
    if schema is Options:
        return {key: info for entry in PLANNERS.values() for key, info in entry.options.model_fields.items()}
    return schema.model_fields if schema is not None else {}


def section_of(annotation: Any) -> type[Section] | None:
    """The section that a key holds, if it holds one."""
    kinds = (annotation, *get_args(annotation))
    return next((kind for kind in kinds if is_class_of(kind, Section)), None)


def is_class_of(annotation: Any, kind: type[Kind]) -> TypeGuard[type[Kind]]:
    """Whether an annotation is that class or one derived from it. Python 3.10 takes `list[str]` for a class, too."""
    return get_origin(annotation) is None and isclass(annotation) and issubclass(annotation, kind)


def _nearest(key: str, schema: type[BaseModel], prefix: str) -> str:
    """The valid key that was likely meant: by its whole path, else by its last part in whatever section."""
    valid_keys = [each for each in _keys(schema, prefix) if not key.startswith(f"{each}.")]
    by_last_part = {valid.rsplit(".", 1)[-1]: valid for valid in valid_keys}
    close = difflib.get_close_matches(key, valid_keys, n=1, cutoff=0.7) or [
        by_last_part[part]
        for part in difflib.get_close_matches(key.rsplit(".", 1)[-1], list(by_last_part), n=1)
    ]
    return f"; did you mean {close[0]}?" if close else f"; valid here: {', '.join(schema.model_fields)}"


def _keys(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, info in _fields(section).items():
        yield prefix + name
        inner = section_of(info.annotation)
        if inner is not None:
            yield from _keys(inner, f"{prefix}{name}.")
