"""What ZeRO's stages need of a plan's execution, and what they cannot run."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from timm.models.vision_transformer import Block
from torch import nn

from d2ft_hpc.engines.deepspeed_private import import_deepspeed
from d2ft_hpc.errors import ConfigError
from d2ft_hpc.execution.executor import PlanExecutor
from d2ft_hpc.execution.gradients import Reduction

_REFUSED = {
    "pipeline": "",
}


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
                f"with which its engine multiplies the loss under ZeRO only. Use stage 1, or bf16"
            )
        if stage not in (0, 1, 2, 3):
            raise ConfigError(f"{where}zero_optimization.stage={stage!r}: ZeRO has the stages 0, 1, 2 and 3")
        return ZeroRules(
            stage=stage,
            reduction={2: Reduction.EVERY_MICRO_BATCH, 3: Reduction.BY_BLOCK}.get(
                stage, Reduction.LAST_MICRO_BATCH
            ),
        )

    def prepare(
        self, model: nn.Module, executor: PlanExecutor, slot_source: Callable[[], int] | None = None
    ) -> None:
        """Before `deepspeed.initialize`: fits model and executor to the stage."""
        executor.follow(slot_source, self.reduction)
        if self.stage == 3:
            # A leaf module's parameters are gathered and its gradients reduced together, zero where absent, whatever
            # ran inside.
            import_deepspeed().utils.set_z3_leaf_modules(model, [Block])

    def twin_of(self, model: nn.Module) -> nn.Module | None:
        """An empty copy of `model` for `full_model`, taken before the parameters are partitioned."""
        return copy.deepcopy(model).to("meta") if self.stage == 3 else None

    @contextmanager
    def full_model(self, model: nn.Module, twin: nn.Module | None) -> Iterator[nn.Module]:
        """A model with the present weights, all of them on this rank, that no other rank is needed to run.

        Under stage 3 a copy, made by all ranks together; else `model` itself.
        """
        if twin is None:
            yield model
            return
        deepspeed = import_deepspeed()
        device = torch.device(deepspeed.get_accelerator().current_device_name())
        own = dict(model.named_parameters())
        full = copy.deepcopy(twin).to_empty(device=device)
        with torch.no_grad():
            for name, parameter in full.named_parameters():
                with deepspeed.zero.GatheredParameters([own[name]]):
                    parameter.data = own[name].detach().clone()
            for (_, buffer), (_, other) in zip(full.named_buffers(), model.named_buffers(), strict=True):
                buffer.copy_(other)
        yield full.train(model.training)
