"""What ZeRO's stages need of a plan's execution, and what they cannot run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from packaging.version import Version
from torch import nn
from torch.nn import functional

from d2ft_hpc.engines.deepspeed_private import import_deepspeed
from d2ft_hpc.errors import ConfigError
from d2ft_hpc.execution.block_graphs import GradientPlace
from d2ft_hpc.execution.executor import PlanExecutor
from d2ft_hpc.execution.gradients import Reduction
from d2ft_hpc.families.table import family_of, find_backbone

_REDUCTIONS = {
    0: Reduction.LAST_MICRO_BATCH,
    1: Reduction.LAST_MICRO_BATCH,
    2: Reduction.EVERY_MICRO_BATCH,
    3: Reduction.BY_BLOCK,
}

_NEVER_TRIED = {
    "zero_optimization.zenflow": "reduces chosen columns of gradients",
    "zero_optimization.offload_optimizer.super_offload": "steps while the backward runs",
    "zero_optimization.zero_quantized_gradients": "reduces rounded gradients",
    "zero_optimization.zero_hpz_partition_size": "partitions weights a second time",
    "zero_optimization.mics_shard_size": "partitions weights over part of the ranks",
    "compile.deepcompile": "compiles the dense graph",
    "data_efficiency.data_routing.random_ltd.enabled": "drops tokens of its own choice",
    "hybrid_engine.enabled": "replaces blocks for inference",
    "sparse_gradients": "sends gradients in another form",
    "sequence_parallel_size": "splits samples over ranks",
}
"""Settings of DeepSpeed under which plans were never compared with one process, and why they matter."""


_ADDS_UP_FROM = "0.18"
"""The first DeepSpeed whose ZeRO 1 and 2 are not known to be wrong without contiguous gradients: in 0.16.4 to 0.17.6
dense training differs from one process after a few steps."""


def adds_up_wrong() -> bool:
    """Whether the installed DeepSpeed is older."""
    return Version(version("deepspeed")) < Version(_ADDS_UP_FROM)


_NEVER_CLEARS = "0.17.6", "0.18.6"
"""The first DeepSpeed that never clears the gradients of bf16 without ZeRO, which add up from step to step (its issue
7837), and the first that does again."""
_KEEPS_THE_LAST = "0.17.6", "0.18.3"
"""The first DeepSpeed whose ZeRO 2 keeps only the last micro-batch's gradients (its issue 7718), and the first that
adds them up again. With an offloaded optimizer they are added up elsewhere, and rightly."""


def _is_installed(first: str, mended: str) -> bool:
    """Whether DeepSpeed is of a release from `first` on, and before `mended`."""
    return Version(first) <= Version(version("deepspeed")) < Version(mended)


@dataclass(frozen=True)
class ZeroRules:
    """How one DeepSpeed configuration runs plans exactly."""

    stage: int
    reduction: Reduction

    @staticmethod
    def of(config: Mapping[str, Any], where: str = "") -> ZeroRules:
        """The rules for a DeepSpeed configuration; `where` stands before its keys in messages.

        Raises ConfigError where the configuration cannot run a plan exactly.
        """
        zero = config.get("zero_optimization", {})
        stage = zero.get("stage", 0)
        if config.get("fp16", {}).get("enabled", False) and stage == 0:
            raise ConfigError(
                f"{where}zero_optimization.stage=0 with fp16: DeepSpeed's fp16 optimiser divides by the loss scale, "
                f"but its engine multiplies the loss by it only under ZeRO. Use stage 1, or bf16"
            )
        if config.get("bf16", {}).get("enabled", False) and stage == 0 and _is_installed(*_NEVER_CLEARS):
            raise ConfigError(
                f"{where}zero_optimization.stage=0 with bf16: DeepSpeed {version('deepspeed')} never clears gradients "
                f"then, under a plan or not. Use stage 1, or install DeepSpeed {_NEVER_CLEARS[1]} or newer"
            )
        steps = config.get("gradient_accumulation_steps", None if "train_batch_size" in config else 1)
        if stage == 2 and steps != 1 and "offload_optimizer" not in zero and _is_installed(*_KEEPS_THE_LAST):
            raise ConfigError(
                f"{where}zero_optimization.stage=2 with accumulated gradients: DeepSpeed {version('deepspeed')} keeps "
                f"only the last micro-batch's, under a plan or not. Use stage 1 or 3, or install DeepSpeed "
                f"{_KEEPS_THE_LAST[1]} or newer"
            )
        if stage in (1, 2) and zero.get("contiguous_gradients") is False and adds_up_wrong():
            raise ConfigError(
                f"{where}zero_optimization.contiguous_gradients=false: DeepSpeed {version('deepspeed')} trains wrongly "
                f"with it, under a plan or not. Remove it, or install DeepSpeed {_ADDS_UP_FROM} or newer"
            )
        if not config.get("managed_gradient_accumulation", True):
            raise ConfigError(
                f"{where}managed_gradient_accumulation=false: DeepSpeed counts no micro-batches then, each of which "
                f"has a row: remove it, and call step() after each of gradient_accumulation_steps micro-batches"
            )
        for key, what in _NEVER_TRIED.items():
            value = _get(config, key)
            if value is True or (value and value != 1):  # a size of 1 is none
                raise ConfigError(
                    f"{where}{key}={value!r} {what}, and was never tried under a plan that skips: remove it"
                )
        return ZeroRules(stage, _REDUCTIONS[stage])

    def same_rows(self, model: nn.Module) -> str | None:
        """Why all replicas must follow the same rows; None where they may differ."""
        backbone = find_backbone(model) if self.stage == 3 else None
        if backbone is not None and family_of(backbone).recomputes(backbone):
            return (
                "ZeRO-3 with activation checkpointing gathers a block's weights again where the block is recomputed, "
                "which only happens on replicas that have FULL heads in it"
            )
        return None

    def prepare(
        self,
        model: nn.Module,
        executor: PlanExecutor,
        slot_source: Callable[[], int] | None = None,
        is_boundary: Callable[[], bool] | None = None,
    ) -> None:
        """To be called before `deepspeed.initialize`: fits model and executor to the stage.

        is_boundary: whether an optimiser step follows the micro-batch that runs; None: after the last one of a batch.
        """
        asks = is_boundary if self.reduction is Reduction.LAST_MICRO_BATCH else None
        executor.bind(
            slot_source,
            self.reduction,
            reduces=None if asks is None else lambda block: asks(),
            gradient_place=GradientPlace.OWN if self.stage < 2 else GradientPlace.COPIED,
        )
        if self.stage == 3:
            # A leaf module's parameters are gathered and its gradients reduced together, zero where absent, whatever
            # ran inside.
            import_deepspeed().utils.set_z3_leaf_modules(
                model, list({type(block) for block in executor.blocks.values()})
            )


def with_linear_of_torch(config: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of ZeRO 3 with which DeepSpeed leaves torch's linear function in its place. It puts one of its own
    there, for the whole process, whose weights may get no gradient in compiled blocks.

    Raises ConfigError where the settings ask for that one, or another engine has put it there.
    """
    zero = config["zero_optimization"]
    if zero.get("memory_efficient_linear", False):
        raise ConfigError(
            "zero_optimization.memory_efficient_linear=true: compiled blocks may not train through DeepSpeed's linear "
            "function; remove it, or compile=false"
        )
    if functional.linear.__module__.startswith("deepspeed"):
        raise ConfigError(
            "compile=true: another ZeRO 3 engine of this process has put DeepSpeed's linear function in place of "
            "torch's, through which compiled blocks may not train; give that engine "
            "zero_optimization.memory_efficient_linear=false"
        )
    return {**config, "zero_optimization": {**zero, "memory_efficient_linear": False}}


def _get(config: Mapping[str, Any], dotted: str) -> Any:
    value: Any = config
    for part in dotted.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value
