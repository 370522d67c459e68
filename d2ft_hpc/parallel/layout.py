"""Which part of a run each rank does: pipeline stage, data-parallel replica, tensor-parallel rank."""

from __future__ import annotations

from dataclasses import dataclass

from d2ft_hpc.errors import ConfigError


@dataclass(frozen=True)
class Layout:
    """rank = (stage * replicas + replica) * tensor_ranks + tensor_rank, the order of DeepSpeed's 3D topology.

    stages, replicas, tensor_ranks: how many there are of each. rank: this process's.
    """

    stages: int
    replicas: int
    tensor_ranks: int
    rank: int

    @staticmethod
    def of(world_size: int, rank: int, *, stages: int = 1, tensor_ranks: int = 1) -> Layout:
        """What is left of the ranks are replicas. Raises ConfigError where the ranks cannot be divided so."""
        parts = stages * tensor_ranks
        if world_size % parts:
            raise ConfigError(
                f"engine.pipeline_stages={stages} x engine.tensor_parallel={tensor_ranks}: {world_size} ranks cannot be "
                f"divided into replicas of {parts}; start a multiple of {parts} ranks"
            )
        return Layout(stages, world_size // parts, tensor_ranks, rank)

    @property
    def stage(self) -> int:
        return self.rank // (self.replicas * self.tensor_ranks)

    @property
    def replica(self) -> int:
        return self.rank // self.tensor_ranks % self.replicas

    @property
    def tensor_rank(self) -> int:
        return self.rank % self.tensor_ranks

    @property
    def is_cut(self) -> bool:
        """A rank holds a part of the model only."""
        return self.stages * self.tensor_ranks > 1

    @property
    def leads_replica(self) -> bool:
        """The one rank of its replica that speaks for it."""
        return self.stage == 0 and self.tensor_rank == 0

    def rank_of(self, *, stage: int = 0, replica: int = 0, tensor_rank: int = 0) -> int:
        return (stage * self.replicas + replica) * self.tensor_ranks + tensor_rank
