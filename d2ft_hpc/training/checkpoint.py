"""Checkpoints: folders that are complete or absent, with a checksum of every file."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from d2ft_hpc.engines.engine import Engine
from d2ft_hpc.errors import CheckpointError
from d2ft_hpc.launch import Control, agreed
from d2ft_hpc.planning import SkipPlan

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Position:
    """Where a run stands, between two epochs."""

    epochs_done: int = 0
    steps_done: int = 0
    plans_made: int = 0


def save_checkpoint(
    folder: Path, engine: Engine, plan: SkipPlan, position: Position, control: Control
) -> Path:
    """Writes checkpoint `folder/epoch-N`; on all ranks together. Until it is complete it has another name."""
    target = folder / f"epoch-{position.epochs_done:04d}"
    building = target.with_suffix(".building")
    with agreed(control, "making the checkpoint's folder"):
        if control.rank == 0:
            shutil.rmtree(building, ignore_errors=True)
            building.mkdir(parents=True)
    engine.save(building)
    with agreed(control, "saving the checkpoint"):
        torch.save(torch.get_rng_state(), building / _random_state_name(control.rank))
    with agreed(control, "completing the checkpoint"):
        if control.rank == 0:
            plan.save(building / "plan.h5")
            (building / "position.json").write_text(json.dumps(asdict(position)))
            checksums = {str(path.relative_to(building)): _sha256(path) for path in _files(building)}
            (building / MANIFEST).write_text(json.dumps(checksums, indent=1))
            shutil.rmtree(target, ignore_errors=True)
            os.replace(building, target)
    return target


def newest_checkpoint(folder: Path) -> Path:
    """The newest complete checkpoint. Raises CheckpointError if there is none."""
    complete = sorted(
        path.parent for path in folder.glob(f"epoch-*/{MANIFEST}") if path.parent.suffix != ".building"
    )
    if not complete:
        raise CheckpointError(
            f"train.resume=true: no checkpoint in {folder}; set train.checkpoint_every_epochs"
        )
    return complete[-1]


def load_checkpoint(checkpoint: Path, engine: Engine, control: Control) -> tuple[SkipPlan, Position]:
    """Restores engine and random state; on all ranks together. Raises CheckpointError on all if any file is damaged.

    Every file is compared with its checksum before anything is read from it.
    """
    with agreed(control, f"checking checkpoint {checkpoint}"):
        if control.rank == 0:
            _verify(checkpoint)
        if not (checkpoint / _random_state_name(control.rank)).exists():
            raise CheckpointError(
                f"{checkpoint}: saved by fewer ranks than now run; resume with the same number"
            )
    engine.load(checkpoint)
    torch.set_rng_state(torch.load(checkpoint / _random_state_name(control.rank), weights_only=True))
    position = Position(**json.loads((checkpoint / "position.json").read_text()))
    return SkipPlan.load(checkpoint / "plan.h5"), position


def _verify(checkpoint: Path) -> None:
    try:
        checksums: dict[str, str] = json.loads((checkpoint / MANIFEST).read_text())
        damaged = [name for name, checksum in checksums.items() if _sha256(checkpoint / name) != checksum]
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{checkpoint}: damaged ({error}); delete it to resume from the one before"
        ) from None
    if damaged:
        raise CheckpointError(
            f"{checkpoint}: {damaged[0]} is damaged; delete the folder to resume from the one before"
        )


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _random_state_name(rank: int) -> str:
    return f"random-state-{rank}.pt"
