"""Where a run starts: at its beginning, from a checkpoint, or not at all because it is finished."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from d2ft_hpc.config import RunConfig
from d2ft_hpc.errors import CheckpointError, ConfigError
from d2ft_hpc.launch import Control, share
from d2ft_hpc.launch.control import print_line
from d2ft_hpc.results import open_run
from d2ft_hpc.training import run_folder
from d2ft_hpc.training.checkpoint import Position, complete_checkpoints, read_position, verify
from d2ft_hpc.training.job import Job

MAY_CHANGE = (
    "engine.name",  # checkpoints do not depend on how an engine spreads a state
    "engine.deepspeed",
    "run.folder",
    "data.root",
    "data.workers",
    "train.epochs",
    "train.evaluate_",
    "train.checkpoint_",
    "train.keep_checkpoints",
    "train.resume",
    "plan.score_cache",
    "launch.",
    "results.",
)
"""What a resumed run may set otherwise than the run did before; everything else decides its losses."""


class ForeignCheckpointError(CheckpointError):
    """A checkpoint holds the configuration of another run."""


@dataclass(frozen=True)
class Start:
    finished: bool = False
    checkpoint: Path | None = None
    position: Position = field(default_factory=Position)


def choose_start(config: RunConfig, control: Control) -> Start:
    """The same on all ranks. Raises ConfigError or CheckpointError on all of them."""

    def choose() -> bytes:
        start = _choose(config)
        checkpoint = None if start.checkpoint is None else str(start.checkpoint)
        return json.dumps([start.finished, checkpoint, asdict(start.position)]).encode()

    finished, checkpoint, position = json.loads(share(control, choose, "where to start"))
    return Start(finished, checkpoint and Path(checkpoint), Position(**position))


def fitted_to_ranks(config: RunConfig, position: Position, ranks: int) -> RunConfig:
    """The configuration whose batches over `ranks` ranks have as many rows as the checkpoint's.

    So a run goes on with another number of ranks as it was: the same rows, under the same plan, by fewer or more ranks.
    """
    if position.rows == 0 or config.data.slots * ranks == position.rows:
        return config
    if position.rows % ranks:
        possible = [str(n) for n in range(1, position.rows + 1) if position.rows % n == 0]
        raise ConfigError(
            f"the run has batches of {position.rows} micro-batches, which {ranks} ranks cannot share equally: "
            f"resume it on {', '.join(possible[:-1])} or {possible[-1]} ranks"
            if len(possible) > 1
            else f"the run has batches of one micro-batch: resume it on 1 rank, not {ranks}"
        )
    slots = position.rows // ranks
    return config.model_copy(update={"data": config.data.model_copy(update={"slots": slots})})


def check_position(job: Job, start: Start) -> None:
    """Raises CheckpointError if no run of these batches comes to the checkpoint's position."""
    position, batches = start.position, job.sampler.batches_per_epoch
    whole = position.epochs_done * batches + position.batches_done
    last_was_cut_short = position.batches_done == 0 and whole - batches < position.steps_done < whole
    if position.batches_done > batches or not (position.steps_done == whole or last_was_cut_short):
        raise CheckpointError(
            f"{start.checkpoint}: {position.steps_done} steps, {position.epochs_done} epochs and "
            f"{position.batches_done} batches are no position in epochs of {batches} batches: another data set, or "
            f"damaged; delete the folder to resume from the one before"
        )


def _choose(config: RunConfig) -> Start:
    folder = config.run_folder
    if config.train.resume is False:
        run_folder.check_free(folder)
        return Start()
    run_folder.check_ours(folder)
    before = _config_before(folder, config)
    if before is not None:
        _check_same(before, config)
        if config.train.resume == "auto" and _is_finished(folder, before, config):
            return Start(finished=True)
    of_another: ForeignCheckpointError | None = None
    for checkpoint in reversed(complete_checkpoints(folder / run_folder.CHECKPOINTS)):
        try:
            if config.train.resume == "auto":  # nobody is there to choose an older one
                verify(checkpoint)
            _check_of_run(checkpoint, config)
            return Start(checkpoint=checkpoint, position=read_position(checkpoint))
        except CheckpointError as error:
            if config.train.resume is True:
                raise
            of_another = error if isinstance(error, ForeignCheckpointError) else of_another
            print_line(f"d2ft-hpc: warning: passed over: {error}")
    if of_another is not None:  # a new beginning would take the place of that run's record
        raise of_another
    if config.train.resume is True:
        raise CheckpointError(
            f"train.resume=true: no checkpoint in {folder / run_folder.CHECKPOINTS}; set "
            "train.checkpoint_every_epochs, or train.resume=auto to start without one"
        )
    return Start()


def _is_finished(folder: Path, before: Mapping[str, Any], config: RunConfig) -> bool:
    if before["train"]["epochs"] != config.train.epochs or not (folder / run_folder.MODEL).exists():
        return False
    with open_run(folder) as run:
        return run.complete


def _config_before(folder: Path, config: RunConfig) -> dict[str, Any] | None:
    """That of the run in the folder, None if it is not known. Raises ConfigError where somebody is there to mend it."""
    try:
        return run_folder.read_config(folder)
    except ConfigError as error:
        if config.train.resume is True:
            raise
        print_line(f"d2ft-hpc: warning: {error}; goes on by the configuration that checkpoints hold")
        return None


def _check_of_run(checkpoint: Path, config: RunConfig) -> None:
    """Raises ForeignCheckpointError if the checkpoint is one."""
    try:
        _check_same(run_folder.read_config(checkpoint) or {}, config)
    except ConfigError as error:
        raise ForeignCheckpointError(f"{checkpoint}: of another run: {error}") from None


def _check_same(before: Mapping[str, Any], config: RunConfig) -> None:
    now = dict(_flat(config.model_dump()))
    for key, value in _flat(before):
        if now.get(key, value) != value and not key.startswith(MAY_CHANGE):
            raise ConfigError(
                f"{key}={now[key]}: the run in {config.run_folder} was begun with {value}; set it back to resume that "
                f"run, or choose another run.name"
            )


def _flat(values: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
