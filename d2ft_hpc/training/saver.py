"""Writes checkpoints beside the training: a step waits for copies in memory only, a thread does the rest."""

from __future__ import annotations

import copy
import json
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from d2ft_hpc.engines.engine import Engine
from d2ft_hpc.engines.portable import MODEL, file_bytes
from d2ft_hpc.errors import CheckpointError
from d2ft_hpc.files import atomic
from d2ft_hpc.launch import Control, agreed
from d2ft_hpc.planning import SkipPlan
from d2ft_hpc.training.checkpoint import (
    CONFIG,
    MANIFEST,
    PLAN,
    POSITION,
    Position,
    checkpoint_name,
    complete_checkpoints,
    random_state,
    random_state_name,
    sha256,
)
from d2ft_hpc.training.finite import require_finite
from d2ft_hpc.training.run_folder import KEPT_CHECKPOINTS

_POLL_SECONDS = 0.05


class CheckpointSaver:
    """Saves checkpoints into `folder` and keeps the newest two; a context manager that ends in `finish`.

    Each rank writes its own files and, when they are on disk, a list of them with their checksums. Rank 0 waits for
    all lists, joins them into the manifest and gives the folder its name: so a kill at any moment leaves only whole
    checkpoints and one folder that the next save removes.

    config: the run's configuration as YAML, by which a checkpoint of another run is known.
    """

    def __init__(self, folder: Path, control: Control, *, config: str = "") -> None:
        self._folder, self._control, self._config = folder, control, config
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="checkpoint")
        self._written: Future[None] | None = None
        self._completed: Future[None] | None = None
        self._abandoned = threading.Event()
        self.newest_step = -1
        """Steps done at the newest save."""

    def save(
        self, engine: Engine, plan: SkipPlan, position: Position, flush_results: Callable[[], None]
    ) -> Path:
        """Begins to write the checkpoint at `position`; all ranks call it together. Waits for the checkpoint before
        it.

        flush_results: called in the thread, since the results up to here must outlive this process if the checkpoint
        does.
        Raises CheckpointError on all ranks if the one before could not be written.
        """
        self.finish()
        target = self._folder / checkpoint_name(position.steps_done)
        building = target.with_suffix(".building")
        with agreed(self._control, "making the checkpoint's folder"):
            if self._control.rank == 0:
                for left in self._folder.glob("*.building"):
                    shutil.rmtree(left)
                building.mkdir(parents=True)
        files: list[tuple[Any, Path]] = []
        engine.save(building, lambda state, path: files.append((snapshot(state), path)))
        files.append((random_state(), building / random_state_name(self._control.rank)))
        self._written = self._threads.submit(self._write, building, files, flush_results)
        if self._control.rank == 0:
            self._completed = self._threads.submit(self._complete, building, target, plan, position)
        self.newest_step = position.steps_done
        return target

    def finish(self) -> None:
        """Waits until the newest checkpoint is on disk; all ranks call it together. All of them raise
        CheckpointError, or DivergedError if its weights are not finite: then this checkpoint does not exist, and
        those before it stay.
        """
        if self._written is None:
            return
        # First ask whether every rank has written, since rank 0 would wait for ever for a rank that cannot.
        for part in (self._written, self._completed):
            with agreed(self._control, "saving the checkpoint"):
                try:
                    if part is not None:
                        part.result()
                except OSError as error:
                    raise CheckpointError(
                        f"cannot write below {self._folder}: {error.strerror or error}; free space, or choose another "
                        "run.folder, and resume"
                    ) from error
        self._written = self._completed = None

    def __enter__(self) -> CheckpointSaver:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.finish()
        self._abandoned.set()
        self._threads.shutdown()
        if self._control.rank == 0:  # what an error left unfinished
            for left in self._folder.glob("*.building"):
                shutil.rmtree(left, ignore_errors=True)

    def _write(
        self, building: Path, files: list[tuple[Any, Path]], flush_results: Callable[[], None]
    ) -> None:
        """In a thread: this rank's results and files, then the files' list."""
        flush_results()
        listing = building / _listing_name(self._control.rank)
        checksums = {}
        for state, path in files:
            if path.name == MODEL:
                require_finite(state["tensors"])
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as file:
                if path.suffix == ".safetensors":
                    file.write(file_bytes(state))
                else:
                    torch.save(state, file)
            atomic.sync(path)
            checksums[str(path.relative_to(building))] = sha256(path)
        atomic.write(listing, json.dumps(checksums))

    def _complete(self, building: Path, target: Path, plan: SkipPlan, position: Position) -> None:
        """In a thread of rank 0."""
        plan.write(building / PLAN)
        atomic.write(building / POSITION, json.dumps(asdict(position)))
        if self._config:
            atomic.write(building / CONFIG, self._config)
        listings = [building / _listing_name(rank) for rank in range(self._control.world_size)]
        while not all(listing.exists() for listing in listings):
            if self._abandoned.is_set():
                return
            time.sleep(_POLL_SECONDS)
        checksums: dict[str, str] = {}
        for listing in listings:
            checksums |= json.loads(listing.read_text())
            listing.unlink()
        for path in sorted(path for path in building.rglob("*") if path.is_file()):
            name = str(path.relative_to(building))
            if name not in checksums:  # the plan, the position and what an engine wrote by itself
                checksums[name] = sha256(path)
        atomic.write(building / MANIFEST, json.dumps(checksums, indent=1))
        atomic.replace_folder(building, target)
        for left in self._folder.glob("*.removing"):
            shutil.rmtree(left)
        for old in complete_checkpoints(self._folder)[:-KEPT_CHECKPOINTS]:
            atomic.remove_folder(old)


def snapshot(state: Any) -> Any:
    """A copy on the CPU of everything that the next step may change: nested dicts, lists and tuples of tensors."""
    if isinstance(state, torch.Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, dict):
        copied = copy.copy(state)  # keeps an OrderedDict one, with its attributes
        for key, value in state.items():
            copied[key] = snapshot(value)
        return copied
    if type(state) in (list, tuple):
        return type(state)(map(snapshot, state))
    return copy.copy(state)


def _listing_name(rank: int) -> str:
    return f"rank-{rank}.json"
