"""Scores from training steps that run anyway, for loops whose loss we do not know."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from d2ft_hpc.families.table import backbone_of
from d2ft_hpc.launch import Control, gathered
from d2ft_hpc.lifecycle.controller import ScoreSource
from d2ft_hpc.lifecycle.gather_scores import gather_scores
from d2ft_hpc.model.subnets import SubnetMap
from d2ft_hpc.parallel.rank_layout import RankLayout
from d2ft_hpc.plan_config import PlanConfig
from d2ft_hpc.score_table import SCORES
from d2ft_hpc.scores import Scores, scores_of_weights


class Observer(Protocol):
    """Adds up Fisher information of what this rank holds, while it is open."""

    sums: Tensor
    """float32 [slot, block, head]"""
    flops: int
    """What this took beside the training."""

    def close(self) -> None: ...


class ObservedScores(ScoreSource):
    """Fisher information, averaged over the batches that are observed, and weight magnitude."""

    def __init__(
        self,
        settings: PlanConfig,
        subnets: SubnetMap,
        ranks: Callable[[], tuple[Control, RankLayout]],
        make_observer: Callable[[], Observer],
        full_model: Callable[[], AbstractContextManager[nn.Module]],
    ) -> None:
        """ranks: called when scores are exchanged, not before. full_model: the model with its present weights, of all
        ranks together."""
        self._settings, self._subnets, self._ranks = settings, subnets, ranks
        self._make_observer, self._full_model = make_observer, full_model
        self._observer: Observer | None = None
        self._eager = ExitStack()  # what ends when the observer does
        self._flops = 0  # of batches before, whose scores are in no plan yet

    @property
    def is_observing(self) -> bool:
        return self._observer is not None

    @property
    def flops_of_batch(self) -> int:
        """What observing the batch that runs, or has just run, took on this rank."""
        return 0 if self._observer is None else self._observer.flops

    def measure(self) -> None:
        """Not through torch.compile, whose kernels would keep or lack the observer's hooks."""
        if self._observer is None:
            self._observer = self._make_observer()
            self._eager.enter_context(torch.compiler.set_stance("force_eager"))

    def stop(self) -> None:
        if self._observer is not None:
            self._observer.close()
        self._flops += self.flops_of_batch
        self._observer = None
        self._eager.close()

    def collect(self) -> Scores | None:
        """None where a gradient overflowed, in fp16, or a micro-batch gave none to any block, as without a backward or
        below a classifier that is zero: then the next batch is observed."""
        assert self._observer is not None
        own = self._observer.sums
        self.stop()
        control, layout = self._ranks()
        fisher = gather_scores(control, layout, own)
        if not (np.isfinite(fisher).all() and fisher.any(axis=(1, 2)).all()):
            self.measure()
            return None
        flops, self._flops = sum(gathered(control, self._flops)), 0
        names = (self._settings.forward_score, self._settings.backward_score)
        backward = SCORES[self._settings.backward_score]
        if backward.reads_gradients:
            return Scores(fisher, fisher, 0.0, *names, flops)
        with self._full_model() as model:
            of_weights = scores_of_weights(backward, backbone_of(model), self._subnets).cpu().numpy()
        return Scores(fisher, np.broadcast_to(of_weights, fisher.shape), 0.0, *names, flops)

    def so_far(self) -> npt.NDArray[np.float32] | None:
        """The sums of all ranks, float32 [rank, slot, block, head]; None while nothing is observed."""
        if self._observer is None:
            return None
        own = self._observer.sums.cpu().numpy().astype("<f4")
        of_ranks = self._ranks()[0].all_gather(own.tobytes())
        return np.stack([np.frombuffer(each, "<f4").reshape(own.shape) for each in of_ranks])

    def go_on(self, of_ranks: npt.NDArray[np.float32]) -> None:
        """Observes on from what `so_far` gave."""
        self.measure()
        assert self._observer is not None
        self._observer.sums.copy_(torch.from_numpy(of_ranks[self._ranks()[0].rank].copy()))
