"""Which part of a run each rank has: its pipeline stage, data-parallel replica, tensor-parallel rank and subnets."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from d2ft_hpc.errors import CheckpointError, ConfigError
from d2ft_hpc.files import atomic
from d2ft_hpc.files.untrusted import RefusedError, read_json
from d2ft_hpc.planning.arrays import Ints


@dataclass(frozen=True)
class RankLayout:
    """rank = (stage * replicas + replica) * tensor_ranks + tensor_rank, the order of DeepSpeed's 3D topology.

    stages, replicas, tensor_ranks: how many there are of each. rank: this process's.
    """

    stages: int
    replicas: int
    tensor_ranks: int
    rank: int

    @staticmethod
    def of(world_size: int, rank: int, *, stages: int = 1, tensor_ranks: int = 1) -> RankLayout:
        """Number of replicas that stages and tensor-parallel ranks leave. Raises ConfigError if the ranks cannot be
        divided so."""
        parts = stages * tensor_ranks
        if world_size % parts:
            raise ConfigError(
                f"{stages} pipeline stages x {tensor_ranks} tensor-parallel ranks: {world_size} ranks cannot be "
                f"divided into replicas of {parts}; start a multiple of {parts} ranks"
            )
        return RankLayout(stages, world_size // parts, tensor_ranks, rank)

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
    def world_size(self) -> int:
        return self.stages * self.replicas * self.tensor_ranks

    @property
    def is_cut(self) -> bool:
        """A rank holds a part of the model only."""
        return self.stages * self.tensor_ranks > 1

    @property
    def leads_replica(self) -> bool:
        """Whether this rank speaks for its replica; one rank of each does."""
        return self.stage == 0 and self.tensor_rank == 0

    def rank_of(self, *, stage: int = 0, replica: int = 0, tensor_rank: int = 0) -> int:
        return (stage * self.replicas + replica) * self.tensor_ranks + tensor_rank


@dataclass(frozen=True, eq=False)
class Placement:
    """Which rank of a replica holds which subnet.

    stages: the blocks of each pipeline stage. owner: int64 [block, head], the tensor-parallel rank of each of timm's
    heads.
    """

    layout: RankLayout
    stages: list[range]
    owner: Ints

    @staticmethod
    def whole(world_size: int, rank: int, blocks: int, heads: int) -> Placement:
        """Each rank is a replica that holds all subnets."""
        layout = RankLayout.of(world_size, rank)
        return Placement(layout, [range(blocks)], np.zeros((blocks, heads), dtype=np.int64))

    @property
    def stage(self) -> Ints:
        """Pipeline stage of each block, int64 [block]."""
        return np.repeat(np.arange(len(self.stages)), [len(blocks) for blocks in self.stages])

    @property
    def blocks(self) -> range:
        """This rank's blocks."""
        return self.stages[self.layout.stage]

    @property
    def own(self) -> npt.NDArray[np.bool_]:
        """This rank's subnets, bool [block, head]."""
        here = self.stage[:, None] == self.layout.stage
        return np.asarray(here & (self.owner == self.layout.tensor_rank))

    @property
    def fits(self) -> bool:
        """Whether it was made for as many stages and tensor-parallel ranks as the layout has."""
        return (len(self.stages), int(self.owner.max()) + 1) == (self.layout.stages, self.layout.tensor_ranks)

    def write(self, path: Path) -> None:
        edges = [[blocks.start, blocks.stop] for blocks in self.stages]
        atomic.write(path, json.dumps({"stages": edges, "owner": self.owner.tolist()}))

    @staticmethod
    def read(path: Path, layout: RankLayout) -> Placement:
        """What `write` wrote, for one process of `layout`. Raises CheckpointError if it places no model."""
        try:
            saved = read_json(path)
            edges = np.array(saved["stages"], dtype=np.int64).reshape(-1, 2)
            owner = np.array(saved["owner"], dtype=np.int64)
            if owner.ndim != 2 or owner.min() < 0:
                raise RefusedError(f"it gives owners of the shape {owner.shape}")
            if (edges[:, 0] != [0, *edges[:-1, 1]]).any() or edges[-1, 1] != len(owner):
                raise RefusedError(f"its stages do not follow each other up to block {len(owner)}")
            if (edges[:, 0] >= edges[:, 1]).any():
                raise RefusedError("it has a stage without blocks")
        except (OSError, LookupError, ValueError, TypeError, OverflowError) as error:
            raise CheckpointError(f"{path}: not the placement of a model ({error})") from None
        return Placement(layout, [range(start, stop) for start, stop in edges.tolist()], owner)
