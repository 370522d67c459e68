"""A learning rate of its own for each head, by how many of a batch's micro-batches it is FULL in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from d2ft_hpc.execution.executor import PlanExecutor
from d2ft_hpc.planning import Operation, SkipPlan


class HeadRates:
    """Shortens an optimiser's steps of heads that are FULL in few micro-batches.

    A head's step, weight decay included, is multiplied by its share of FULL micro-batches to the power `exponent`: the
    mean gradient over n micro-batches has a deviation of 1 / sqrt(n), and AdamW's step does not shrink with it. Scaling
    by sqrt(n) follows from the optimiser's stochastic differential equation (Malladi et al., arXiv 2205.10287).
    """

    def __init__(self, model: nn.Module, executor: PlanExecutor, exponent: float) -> None:
        self._model, self._executor, self._exponent = model, executor, exponent
        self._plan: SkipPlan | None = None
        self._factors: list[tuple[nn.Parameter, Tensor]] = []

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The steps that parameters make inside are shortened at its end."""
        plan = self._executor.plan
        if plan is not self._plan:
            self._plan, self._factors = plan, [] if plan is None else self._of_parameters(plan)
        before = [parameter.detach().clone() for parameter, _ in self._factors]
        yield
        with torch.no_grad():
            for (parameter, factor), old in zip(self._factors, before, strict=True):
                parameter.copy_(old + factor * (parameter - old))

    def _of_parameters(self, plan: SkipPlan) -> list[tuple[nn.Parameter, Tensor]]:
        """The parameters with a head below 1, each with its heads' factors, which broadcast over it."""
        subnets = self._executor.subnets
        if self._exponent == 0 or plan.binding == "sample":
            return []
        share = (plan.operations == Operation.FULL).mean(axis=0) ** self._exponent  # [block, head]
        factors = []
        for block, name, parameter in subnets.parameters(self._model):
            if parameter.requires_grad and (share[block] < 1).any():
                axis = subnets.head_axes[name]
                own = torch.tensor(share[block], dtype=parameter.dtype, device=parameter.device)
                factors.append((parameter, axis.by_entry(own)))
        return factors
