"""Where a run starts: at its beginning, from a checkpoint, or not at all because it is finished."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from d2ft_hpc.config import RunConfig
from d2ft_hpc.config_faults import is_class_of
from d2ft_hpc.errors import CheckpointError, ConfigError, ResultsError
from d2ft_hpc.interval import Interval
from d2ft_hpc.launch import Control, share
from d2ft_hpc.launch.control import print_line
from d2ft_hpc.results import open_run
from d2ft_hpc.results.run_lock import check_unlocked
from d2ft_hpc.results.superseded import is_unbegun
from d2ft_hpc.training import run_folder
from d2ft_hpc.training.checkpoint import Position, complete_checkpoints, read_position, verify
from d2ft_hpc.training.job import Job
from d2ft_hpc.training.older_config import in_todays_keys, values_of

MAY_CHANGE = (
    "engine.name",  # checkpoints do not depend on how an engine spreads a state
    "engine.deepspeed",
    "engine.cuda_graphs",
    "run.folder",
    "data.root",
    "data.workers",
    "train.epochs",
    "train.evaluate_",
    "train.checkpoint_",
    "train.resume",
    "launch.",
    "results.",
)
"""Settings that a resumed run may change; all others decide its losses."""


class ForeignCheckpointError(CheckpointError):
    """A checkpoint holds the configuration of another run."""


@dataclass(frozen=True)
class Start:
    finished: bool = False
    checkpoint: Path | None = None
    position: Position = field(default_factory=Position)


def choose_start(config: RunConfig, control: Control) -> Start:
    """The same on all ranks. Raises ConfigError, CheckpointError or ResultsError on all of them."""

    def choose() -> bytes:
        start = _choose(config)
        checkpoint = None if start.checkpoint is None else str(start.checkpoint)
        return json.dumps([start.finished, checkpoint, asdict(start.position)]).encode()

    finished, checkpoint, position = json.loads(share(control, choose, "where to start"))
    return Start(finished, checkpoint and Path(checkpoint), Position(**position))


def fitted_to_ranks(config: RunConfig, position: Position, ranks: int) -> RunConfig:
    """The configuration, with as many slots as give batches over `ranks` ranks the rows of the checkpoint's. So a run
    goes on unchanged with another number of ranks: the same rows under the same plan.
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


def in_cut_epoch(job: Job, start: Start) -> Start:
    """Where the last epoch of the run was cut short (train.steps_share) and the run is to have more steps now: the same
    place within that epoch."""
    position, batches = start.position, job.sampler.batches_per_epoch
    rest = position.epochs_done * batches - position.steps_done
    if position.batches_done or rest == 0 or position.steps_done == job.total_steps:
        return start
    cut = replace(position, epochs_done=position.epochs_done - 1, batches_done=batches - rest)
    return replace(start, position=cut)


def check_length(job: Job, start: Start) -> None:
    """Raises ConfigError if the run has done more steps than it is now to have."""
    total, done = job.total_steps, start.position.steps_done
    if done > total:
        raise ConfigError(
            f"train.epochs={job.config.train.epochs} makes {total} steps, but the run in {job.config.run_folder} has "
            f"done {done} already: set it higher to resume that run, or choose another run.name"
        )


def _choose(config: RunConfig) -> Start:
    folder = config.run_folder
    run_folder.check_possible(folder)
    check_unlocked(folder / run_folder.RESULTS)  # whose run would be told to delete what that process writes
    if config.train.resume is False:
        run_folder.check_free(folder, may_hold_a_start=is_unbegun(folder / run_folder.RESULTS))
        return Start()
    run_folder.check_ours(folder)
    checkpoints = complete_checkpoints(folder / run_folder.CHECKPOINTS)
    before = _config_before(folder, config)
    if before is None or (not checkpoints and is_unbegun(folder / run_folder.RESULTS)):
        before = {}  # the settings of a run that never began a step do not bind this one
    check_same(before, config)
    epochs_before, epochs = values_of(before, "train").get("epochs"), config.train.epochs
    steps = _steps_if_finished(folder)
    finished = steps is not None
    if finished and epochs_before == epochs:
        return Start(finished=True)
    if finished and epochs_before is not None and epochs < epochs_before:
        further = ", or higher to go on," if _can_go_on(checkpoints, steps) else ""
        raise ConfigError(
            f"train.epochs={epochs}: the run in {folder} is finished after {epochs_before}; set it back{further} or "
            f"choose another run.name"
        )
    start = _newest(checkpoints, config)
    if steps is not None and not _has_the_end(start, steps):
        lacks = (
            "has no checkpoint to go on from"
            if start.checkpoint is None
            else f"its newest checkpoint is of before its end, {start.checkpoint.name}, so that going on would replace "
            f"what came after"
        )
        raise CheckpointError(
            f"train.epochs={epochs}: the run in {folder} is finished after {epochs_before}, and {lacks}: "
            f"{_anew_from_its_weights(folder)}"
        )
    if start.checkpoint is None:
        if config.train.resume is True:
            raise CheckpointError(
                f"train.resume=true: no checkpoint in {folder / run_folder.CHECKPOINTS}; set "
                "train.checkpoint_every, or train.resume=auto to start without one"
            )
    elif epochs_before not in (None, epochs):
        scales = config.plan.token_share is not None
        follows = "learning rate and image sizes" if scales else "learning rate"
        spent = "; its steps on large images come on top of the compute budget" if scales and finished else ""
        print_line(
            f"d2ft-hpc: train.epochs={epochs}, {'finished' if finished else 'begun'} with {epochs_before}: goes on "
            f"from {start.checkpoint.name}, with the {follows} of a run of {epochs}{spent}"
        )
    return start


def _newest(checkpoints: Sequence[Path], config: RunConfig) -> Start:
    """From the newest of the run's own checkpoints that is whole, or else the beginning. Raises ForeignCheckpointError
    where there are only another run's."""
    of_another: ForeignCheckpointError | None = None
    for checkpoint in reversed(checkpoints):
        try:
            if config.train.resume == "auto":  # nobody is there to choose an older one
                verify(checkpoint)
            _check_of_run(checkpoint, config)
            return _from(checkpoint)
        except CheckpointError as error:
            if config.train.resume is True:
                raise
            of_another = error if isinstance(error, ForeignCheckpointError) else of_another
            print_line(f"d2ft-hpc: warning: passed over: {error}")
    if of_another is not None:  # a new beginning would take the place of that run's record
        raise of_another
    return Start()


def _from(checkpoint: Path) -> Start:
    return Start(checkpoint=checkpoint, position=read_position(checkpoint))


def _has_the_end(start: Start, steps: int) -> bool:
    """Whether a run that is finished after so many steps can go on from there."""
    return start.checkpoint is not None and start.position.steps_done >= steps


def to_train_further(config: RunConfig) -> str:
    """What to set for a run that is finished."""
    steps = _steps_if_finished(config.run_folder)
    if _can_go_on(complete_checkpoints(config.run_folder / run_folder.CHECKPOINTS), steps):
        return "raise train.epochs"
    return _anew_from_its_weights(config.run_folder)


def _can_go_on(checkpoints: Sequence[Path], steps: int | None) -> bool:
    """Whether the newest checkpoint of a run that is finished after so many steps is of its end."""
    with suppress(CheckpointError):  # of a damaged one, which an older one would take the place of
        return bool(checkpoints) and steps is not None and _has_the_end(_from(checkpoints[-1]), steps)
    return False


def _anew_from_its_weights(folder: Path) -> str:
    return f"choose another run.name, with model.weights={folder / run_folder.MODEL}"


def _steps_if_finished(folder: Path) -> int | None:
    """How many steps the run had; None if it is not finished."""
    if not (folder / run_folder.MODEL).exists():
        return None
    try:
        with open_run(folder) as run:
            return len(run.table("steps", ["step"])["step"]) if run.complete else None
    except ResultsError:  # the record is lost: `record` says so, and begins a new one
        return None


def _config_before(folder: Path, config: RunConfig) -> dict[str, Any] | None:
    """The configuration of the run in the folder, None if it is not known. Raises ConfigError where the user can mend
    it."""
    try:
        return run_folder.saved_config(folder)
    except ConfigError as error:
        if config.train.resume is True:
            raise
        print_line(f"d2ft-hpc: warning: {error}; goes on by the configuration that checkpoints hold")
        return None


def _check_of_run(checkpoint: Path, config: RunConfig) -> None:
    """Raises ForeignCheckpointError if the checkpoint is one."""
    try:
        check_same(run_folder.saved_config(checkpoint) or {}, config)
    except ConfigError as error:
        raise ForeignCheckpointError(f"{checkpoint}: of another run: {error}") from None


def check_same(before: Mapping[str, Any], config: RunConfig) -> None:
    """Raises ConfigError if a run with the settings `before`, as a file holds them, would go on with others."""
    now = dict(_settings(RunConfig, config.model_dump()))
    for key, value in _settings(RunConfig, in_todays_keys(before, config)):
        if not _are_the_same(now[key], value) and not key.startswith(MAY_CHANGE):
            raise ConfigError(
                f"{key}={now[key]}: the run in {config.run_folder} was begun with {value}; set it back to resume that "
                f"run, choose another run.name, or delete the folder to begin anew"
            )


def _are_the_same(one: Any, other: Any) -> bool:
    """Whether two values of a key say the same; '1 epoch' and '1 epochs' do."""
    if isinstance(one, str) and isinstance(other, str):
        of_one, of_other = Interval.read(one), Interval.read(other)
        return one == other if of_one is None else of_one == of_other
    return bool(one == other)


def _settings(
    section: type[BaseModel], values: Mapping[str, Any], prefix: str = ""
) -> Iterator[tuple[str, Any]]:
    """Key and value of each setting that is given. A section that may hold any keys, or may be absent, counts as one
    value."""
    for name, described in section.model_fields.items():
        if name not in values:  # the run was begun with an older version
            continue
        value, kind = values[name], described.annotation
        if is_class_of(kind, BaseModel) and isinstance(value, dict):
            yield from _settings(kind, value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
