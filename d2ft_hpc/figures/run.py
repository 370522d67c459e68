"""One run as figures need it: each table read once, and the quantities that several figures show."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from d2ft_hpc import results
from d2ft_hpc.config import EngineConfig
from d2ft_hpc.launch.control import print_line
from d2ft_hpc.plan_config import PlanConfig
from d2ft_hpc.results.reader import slowest
from d2ft_hpc.results.schema import Array, Table

_STEP_COLUMNS = (
    *("step", "plan", "loss", "dense_flops", "planned_flops", "executed_flops", "bytes_sent", "memory_bytes"),
    *("full_rows", "forward_only_rows", "left_out_rows", "planned_bytes", "dense_bytes"),
    *("data_seconds", "forward_seconds", "backward_seconds", "communication_seconds", "optimizer_seconds"),
    *("other_seconds", "step_seconds", "waiting_seconds", "recording_seconds", "epoch"),
)


_MACHINE = ("device", "cpu_count", "threads_per_rank", "torch")
"""What the record of the environment says of times."""
_OF_TIME = ("engine.", "model.", "data.", "train.epochs", "compile", "cuda_graphs", "embeddings")
"""Beginnings of settings that decide times; the last three are of a loop of the user's own."""
_WITHOUT_TIME = ("engine.device", "model.weights", "data.root")
"""Settings among them that do not; `device` is in the environment."""


class Run:
    """An open run. `state` says in words why it is not complete, and is empty if it is.

    Shares are fractions; what was not recorded is NaN. Raises ResultsError if it cannot be read.
    """

    def __init__(self, path: Path, name: str) -> None:
        self.name = name
        self.results = results.open(path)
        self.path, self.complete = self.results.path, self.results.complete
        self.state = ""
        if self.results.goes_on:
            self.state = "still going on"
        elif not self.complete:
            events = self.results.table("events", ["kind"])["kind"]
            was_saved = len(events) > 0 and events[-1] == "stop"
            self.state = "stopped; can be resumed" if was_saved else "did not end in order"

    @cached_property
    def config(self) -> dict[str, Any]:
        """The run's configuration, plain dicts; {} if it is not recorded."""
        return self.results.config or {}

    def setting(self, key: str) -> Any:
        """The value of a dotted key of the configuration; None if it is not recorded."""
        value: Any = self.config
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        return value

    @property
    def seed(self) -> int | None:
        """None if it is not recorded."""
        seed = self.setting("run.seed")
        return None if seed is None else int(seed)

    @property
    def method(self) -> dict[str, Any]:
        """What runs with different seeds have in common: the configuration without section `run`, and the number of
        ranks."""
        return {key: value for key, value in self.config.items() if key != "run"} | {"ranks": self.world_size}

    @property
    def conditions(self) -> dict[str, Any]:
        """What decides the times of runs beside their plans: machine, ranks and settings, as far as recorded."""
        settings: dict[str, Any] = {}
        for section, value in self.config.items():
            of_section = value.items() if isinstance(value, dict) else ()
            settings |= {str(section): value} | {f"{section}.{key}": each for key, each in of_section}
        environment = self.results.attributes("environment")
        return {
            **({"ranks": self.world_size} if self.world_size else {}),
            **{key: environment[key] for key in _MACHINE if key in environment},
            **{
                key: value
                for key, value in settings.items()
                if key.startswith(_OF_TIME) and key not in _WITHOUT_TIME
            },
        }

    @cached_property
    def steps(self) -> Table:
        """The steps' columns that figures show."""
        return self.results.table("steps", _STEP_COLUMNS)

    @cached_property
    def evaluations(self) -> Table:
        """Evaluations whose accuracy is known."""
        table = self.results.table("evaluations")
        known = np.isfinite(table["accuracy"])
        return {name: column[known] for name, column in table.items()}

    @cached_property
    def plans(self) -> Table:
        """All plans."""
        return self.results.table("plans")

    @property
    def recomputes(self) -> bool:
        """Whether measured compute has the activations that checkpointing recomputes."""
        of_loop = "recompute" in self.results.table("events", ["kind"])["kind"]  # which has no such setting
        return of_loop or self.setting("engine.activation_checkpointing") is True

    @cached_property
    def engine(self) -> EngineConfig | None:
        """The engine's configuration; None if it is not recorded, or of another version."""
        try:
            return EngineConfig.model_validate(self.setting("engine"))
        except ValidationError:
            return None

    @property
    def asked_steps_share(self) -> float:
        """train.steps_share, as a number; NaN if a rule of another version decides it."""
        asked = self.setting("train.steps_share")
        if asked != "auto":
            return 1.0 if asked is None else float(asked)  # None: of an older version
        try:
            return PlanConfig.model_validate(self.setting("plan")).steps_share(self.setting("train.epochs"))
        except ValidationError:
            return np.nan

    @property
    def steps_share(self) -> float:
        """Share of its epochs' dense compute that the run's steps have, or as asked if it is not finished."""
        share, epochs = self.asked_steps_share, self.setting("train.epochs")
        dense, epoch = self.steps["dense_flops"], self.steps["epoch"]
        if share < 1 and self.complete and epochs and epoch.any():  # whole epochs are known
            share = float(total(dense) / (epochs * total(dense[epoch == 0])))
        return share

    @property
    def replicas(self) -> int:
        """Data-parallel replicas."""
        environment = self.results.attributes("environment")
        return int(environment.get("replicas", environment.get("world_size", self.world_size)))

    @property
    def accuracy(self) -> float:
        """Top-1 of the last evaluation."""
        accuracy = self.evaluations["accuracy"]
        return float(accuracy[-1]) if len(accuracy) else float("nan")

    @property
    def world_size(self) -> int:
        """Ranks that recorded steps."""
        return int(self.steps["dense_flops"].shape[1])

    @property
    def is_dense(self) -> bool:
        """Whether everything was computed, as far as it was recorded."""
        return bool(self.planned_compute > 0.999)

    @property
    def planned_compute(self) -> float:
        """FLOPs that the plans ask for over those of the dense model."""
        return share(self.steps["planned_flops"], self.steps["dense_flops"])

    @property
    def measured_compute(self) -> float:
        """FLOPs executed over those of the dense model."""
        return share(self.steps["executed_flops"], self.steps["dense_flops"])

    @property
    def train_seconds(self) -> float:
        """Sum over steps of the slowest rank's time."""
        return float(slowest(self.steps["step_seconds"]).sum())

    def per_dense_flop(self, seconds: Array) -> Array:
        """The slowest rank's seconds of each step divided by the FLOPs that the dense model would have computed,
        [step, rank] -> [step], so that steps over fewer samples can be compared with others."""
        dense = self.steps["dense_flops"].max(axis=1, initial=0)
        return np.asarray(slowest(seconds) / np.where(dense > 0, dense, 1))

    @property
    def busy_seconds(self) -> Array:
        """Seconds of each step without waiting for data, [step, rank]."""
        return np.asarray(self.steps["step_seconds"] - np.nan_to_num(self.steps["data_seconds"]))

    @cached_property
    def preparation_seconds(self) -> float:
        """Scoring and planning."""
        scoring = self.results.table("scores", ["seconds"])["seconds"]
        planning = self.results.table("plans", ["solve_seconds"])["solve_seconds"]
        return float(np.nansum(planning) + np.nansum(scoring))

    @property
    def total_seconds(self) -> float:
        """Training, scoring and planning."""
        return self.train_seconds + self.preparation_seconds

    @property
    def total_flops(self) -> float:
        """FLOPs executed by all ranks, scoring included."""
        scoring = self.results.table("scores", ["flops"])["flops"]
        return total(self.steps["executed_flops"]) + float(np.nansum(scoring))

    @property
    def total_bytes(self) -> float:
        """Bytes sent by all ranks."""
        return total(self.steps["bytes_sent"])

    @property
    def rank_compute(self) -> Array:
        """FLOPs executed by each rank over those of the dense model, [rank]."""
        executed, dense = self.steps["executed_flops"], self.steps["dense_flops"]
        return np.array([share(executed[:, rank], dense[:, rank]) for rank in range(self.world_size)])

    def curve(self, column: str) -> Array:
        """What all ranks had spent of a column when each evaluation was made, [evaluation]."""
        spent = np.concatenate([[0.0], np.nancumsum(np.nansum(self.steps[column], axis=1))])
        return np.asarray(spent[np.searchsorted(self.steps["step"], self.evaluations["step"])])

    def close(self) -> None:
        """Close the file."""
        self.results.close()


@contextmanager
def open_runs(paths: Sequence[Path]) -> Iterator[list[Run]]:
    """Several runs, each once, with names that tell them apart; inside, they are open."""
    paths = _with_results(paths)
    with ExitStack() as stack:
        names = distinct_names(paths)
        yield [stack.enter_context(closing(Run(path, name))) for path, name in zip(paths, names, strict=True)]


def _with_results(paths: Sequence[Path]) -> list[Path]:
    """Each run once, as `runs/dense runs/*/` names one twice. Folders of runs that never began are left out in words;
    where there is nothing else they stay, and reading them says what is wrong."""

    def file(path: Path) -> Path:
        return path.resolve() / "results.h5" if path.is_dir() else path.resolve()

    named: dict[Path, Path] = {}
    for path in paths:
        named.setdefault(file(path), path)
    begun = [path for results_file, path in named.items() if results_file.is_file() or not path.is_dir()]
    for path in named.values() if begun else ():
        if path not in begun:
            print_line(
                f"d2ft-hpc: warning: {path}: left out, since no results.h5 is in it; its run did not begin"
            )
    return begun or list(named.values())


def as_key(settings: dict[str, Any]) -> str:
    """The same text for the same settings, by which runs are grouped."""
    return json.dumps(settings, sort_keys=True, default=str)


def share(part: Array, whole: Array) -> float:
    """Sum of `part` over sum of `whole` where both were recorded."""
    known = np.isfinite(part) & np.isfinite(whole)
    sum_of_whole = float(whole[known].sum())
    return float(part[known].sum()) / sum_of_whole if sum_of_whole > 0 else float("nan")


def total(values: Array) -> float:
    """Sum of what was recorded; NaN if nothing was."""
    known = np.isfinite(values)
    return float(values[known].sum()) if known.any() else float("nan")


def distinct_names(paths: Sequence[Path]) -> list[str]:
    """The name of each run's folder, longer where two would have the same."""
    folders = []
    for path in map(Path, paths):
        path = path.absolute()
        folders.append(
            path.parent if path.name == "results.h5" else path.with_name(path.name.removesuffix(".h5"))
        )
    names = [folder.name for folder in folders]
    if len(set(names)) < len(names):
        common = os.path.commonpath(folders)
        names = [os.path.relpath(folder, common) for folder in folders]
    return [name if names.count(name) == 1 else f"{name} ({i + 1})" for i, name in enumerate(names)]
