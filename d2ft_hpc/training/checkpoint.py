"""What a checkpoint is, and how one is found, checked and restored; `saver` writes them.

A checkpoint is a folder `checkpoints/step-N`, where N steps are done. It is complete or absent: while it is written it
has another name. It holds what the engine saves, the plan in force (plan.h5), each rank's random state, the position
in the run (position.json), the run's configuration (config.yaml) and the SHA-256 of every one of these files
(manifest.json). Whoever wrote it, only files of the folder itself that the manifest lists are read.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

import torch

from d2ft_hpc.engines.engine import Engine
from d2ft_hpc.errors import CheckpointError
from d2ft_hpc.files.untrusted import RefusedError, read_bytes, read_json
from d2ft_hpc.launch import Control, agreed
from d2ft_hpc.planning import SkipPlan
from d2ft_hpc.safe_text import one_line

MANIFEST = "manifest.json"
POSITION = "position.json"
PLAN = "plan.h5"
CONFIG = "config.yaml"
_MANIFEST_BYTES = 64 << 20
_DEEPEST = 8
"""Most folders inside each other that are searched; a checkpoint has fewer."""
_NAME = re.compile(r"step-(\d{8,18})")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Position:
    """Where a run stands, before a step."""

    epochs_done: int = 0
    batches_done: int = 0
    """Batches done of the present epoch: the position in the data. Batch b is the same for every number of ranks."""
    steps_done: int = 0
    plans_made: int = 0
    rows: int = 0
    """Micro-batches of a batch over all ranks; they stay the same when a run goes on with another number of ranks."""
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
    named = ((_NAME.fullmatch(path.parent.name), path.parent) for path in folder.glob(f"step-*/{MANIFEST}"))
    return [path for _, path in sorted((int(name[1]), path) for name, path in named if name)]


def read_position(checkpoint: Path) -> Position:
    """Raises CheckpointError if the checkpoint is damaged, or no run comes to this position."""
    try:
        position = Position(**read_json(checkpoint / POSITION, 1 << 12))
        for name, value in vars(position).items():
            if type(value) is not int or value < 0:
                raise RefusedError(f"{POSITION} has {name}={value!r}")
        steps = position.steps_done
        if checkpoint.name != checkpoint_name(steps):
            raise RefusedError(f"{POSITION} has steps_done={steps}, not those of the folder's name")
        if max(position.epochs_done, position.batches_done) > steps:
            raise RefusedError(f"{POSITION} has more epochs or batches than its {steps} steps")
    except (OSError, ValueError, TypeError) as error:
        raise damaged(checkpoint, str(error)) from None
    return position


def verify(checkpoint: Path, *, part: int = 0, of: int = 1) -> None:
    """Compares every `of`-th file with its checksum. Raises CheckpointError with the name of a file that is damaged,
    missing, not in the manifest, or outside the folder."""
    try:
        checksums = _read_manifest(checkpoint)
        found = set(_files_in(checkpoint)) - {MANIFEST}
        if found != checksums.keys():
            name = min(found ^ checksums.keys())
            raise RefusedError(f"{name} is {'missing' if name in checksums else f'not in its {MANIFEST}'}")
        for name in sorted(checksums)[part::of]:
            if sha256(checkpoint / name) != checksums[name]:
                raise RefusedError(f"{name} does not have its checksum")
    except (OSError, ValueError) as error:
        raise damaged(checkpoint, str(error)) from None


def _read_manifest(checkpoint: Path) -> dict[str, str]:
    """SHA-256 in hex of each file, by its path in the folder."""
    checksums = read_json(checkpoint / MANIFEST, _MANIFEST_BYTES)
    for name, checksum in checksums.items():
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or str(path) != name or "\0" in name:
            raise RefusedError(f"{MANIFEST} names {name!r}, which is not in the folder")
        if not isinstance(checksum, str) or not _SHA256.fullmatch(checksum):
            raise RefusedError(f"{MANIFEST} has no SHA-256 for {name!r}")
    for name in (PLAN, POSITION):
        if name not in checksums:
            raise RefusedError(f"{MANIFEST} does not have {name}")
    return checksums


def _files_in(folder: Path, prefix: str = "") -> Iterator[str]:
    """Paths of all files in the folder, which may hold only regular files and folders and may not be a link
    itself."""
    if folder.is_symlink():
        raise RefusedError(f"{prefix or 'the folder '}is a symbolic link")
    if prefix.count("/") > _DEEPEST:
        raise RefusedError(f"it has {_DEEPEST} folders in each other")
    for entry in os.scandir(folder):
        name = prefix + entry.name
        if entry.is_dir(follow_symlinks=False):
            yield from _files_in(folder / entry.name, f"{name}/")
        elif entry.is_file(follow_symlinks=False):
            yield name
        else:
            raise RefusedError(f"{name} is not a regular file")


def restore_checkpoint(checkpoint: Path, engine: Engine, control: Control) -> SkipPlan:
    """Restores engine and random state and returns the plan; all ranks call it together.

    Raises CheckpointError on all of them if any file is damaged: each is checked before anything is read from it.
    """
    with agreed(control, f"checking checkpoint {checkpoint}"):
        verify(checkpoint, part=control.rank, of=control.world_size)
    engine.restore(checkpoint)
    own = checkpoint / random_state_name(control.rank)
    if own.exists():  # a rank that was not there when the checkpoint was saved goes on with its own
        try:
            state = torch.load(io.BytesIO(read_bytes(own, 1 << 20)), weights_only=True)
            torch.set_rng_state(state["cpu"])
            if "cuda" in state and torch.cuda.is_available():
                torch.cuda.set_rng_state(state["cuda"])
        except Exception as error:  # torch raises many kinds
            raise damaged(checkpoint, f"{own.name} is no random state: {error}") from error
    return SkipPlan.read(checkpoint / PLAN)


def random_state_name(rank: int) -> str:
    return f"random-state-{rank}.pt"


def random_state() -> dict[str, torch.Tensor]:
    """torch's random state on the CPU and on the current GPU."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def damaged(checkpoint: Path, why: str) -> CheckpointError:
    return CheckpointError(
        f"{checkpoint}: damaged ({one_line(why)}); delete the folder to resume from the one before"
    )


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
