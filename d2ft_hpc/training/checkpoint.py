"""What a checkpoint is, and how one is found, checked and loaded; `saver` writes them.

A checkpoint is a folder `checkpoints/step-N`, where N steps are done. It is complete or absent: while it is written it
has another name. It holds what the engine saves, the plan in force (plan.h5), each rank's random state, the position
in the run (position.json) and the SHA-256 of every one of these files (manifest.json).
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from d2ft_hpc.engines.engine import Engine
from d2ft_hpc.errors import CheckpointError
from d2ft_hpc.launch import Control, agreed
from d2ft_hpc.planning import SkipPlan

MANIFEST = "manifest.json"
POSITION = "position.json"
PLAN = "plan.h5"


@dataclass(frozen=True)
class Position:
    """Where a run stands, before a step."""

    epochs_done: int = 0
    batches_done: int = 0
    """Of the epoch that is under way: the data position. Batch b of an epoch is the same for every number of ranks."""
    steps_done: int = 0
    plans_made: int = 0
    rows: int = 0
    """Micro-batches of a batch over all ranks, which stay as they are when a run goes on with other ranks."""
    ranks: int = 0
    """That saved the checkpoint."""

    def after_step(self) -> Position:
        return replace(self, steps_done=self.steps_done + 1, batches_done=self.batches_done + 1)

    def after_epoch(self) -> Position:
        return replace(self, epochs_done=self.epochs_done + 1, batches_done=0)


def checkpoint_name(steps_done: int) -> str:
    return f"step-{steps_done:08d}"


def complete_checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    return sorted(path.parent for path in folder.glob(f"step-*/{MANIFEST}") if not path.parent.suffix)


def read_position(checkpoint: Path) -> Position:
    """Raises CheckpointError if the checkpoint is damaged."""
    try:
        return Position(**json.loads((checkpoint / POSITION).read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise damaged(checkpoint, str(error)) from None


def verify(checkpoint: Path, *, part: int = 0, of: int = 1) -> None:
    """Compares every `of`-th file with its checksum. Raises CheckpointError, naming a damaged file."""
    try:
        checksums: dict[str, str] = json.loads((checkpoint / MANIFEST).read_text())
        for name in sorted(checksums)[part::of]:
            if sha256(checkpoint / name) != checksums[name]:
                raise damaged(checkpoint, f"{name} does not have its checksum")
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise damaged(checkpoint, str(error)) from None


def load_checkpoint(checkpoint: Path, engine: Engine, control: Control) -> SkipPlan:
    """Restores engine and random state and returns the plan; on all ranks together.

    Raises CheckpointError on all of them if any file is damaged: each is checked before anything is read from it.
    """
    with agreed(control, f"checking checkpoint {checkpoint}"):
        verify(checkpoint, part=control.rank, of=control.world_size)
    engine.load(checkpoint)
    own = checkpoint / random_state_name(control.rank)
    if own.exists():  # a rank that was not there when the checkpoint was saved goes on with its own
        restore_random_state(torch.load(own, weights_only=True))
    return SkipPlan.load(checkpoint / PLAN)


def random_state_name(rank: int) -> str:
    return f"random-state-{rank}.pt"


def random_state() -> dict[str, torch.Tensor]:
    """That of torch, on the CPU and on the current GPU."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_random_state(state: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def damaged(checkpoint: Path, why: str) -> CheckpointError:
    return CheckpointError(f"{checkpoint}: damaged ({why}); delete the folder to resume from the one before")


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
