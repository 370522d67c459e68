"""Shared by the subcommands of `d2ft-hpc` that run a configuration on the ranks that a launcher started."""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from d2ft_hpc.config import RunConfig, read_config
from d2ft_hpc.errors import ConfigError
from d2ft_hpc.paths import path_argument
from d2ft_hpc.settings import of_percent

if TYPE_CHECKING:
    import torch

    from d2ft_hpc.launch import Control
    from d2ft_hpc.launch.signals import StopSignals
    from d2ft_hpc.launch.watch import Watch


def add_config(parser: argparse.ArgumentParser, more: str = "") -> None:
    """The arguments that `config_of` reads. more: words for the help about what may follow besides overrides."""
    parser.add_argument("config", type=path_argument, help="YAML file")
    parser.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="KEY=VALUE",
        help=f"settings that replace the file's{more}",
    )


def whole_number(least: int, most: int | None = None) -> Callable[[str], int]:
    """For argparse: a number from `least` to `most`."""

    def read(text: str) -> int:
        bounds = f"at least {least}" if most is None else f"{least} to {most}"
        try:
            number = int(text)
        except ValueError:
            number = least - 1
        if number < least or (most is not None and number > most):
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number, {bounds}")
        return number

    return read


def share(*, zero: bool = False) -> Callable[[str], float]:
    """For argparse: a number above 0 (zero: or 0) and at most 1."""
    return _number("a share, from 0 to 1" if zero else "a share above 0, at most 1", zero=zero, most=1.0)


def amount(text: str) -> float:
    """For argparse: a finite number above 0."""
    return _number("a number above 0", zero=False, most=sys.float_info.max)(text)


def points(text: str) -> float:
    """For argparse: a number of percentage points."""
    return _number("a number from 0 to 100", zero=True, most=100.0)(text)


def _number(said: str, *, zero: bool, most: float) -> Callable[[str], float]:
    def read(text: str) -> float:
        try:
            number = float(text)
        except ValueError:
            number = math.nan
        if not (0 < number <= most or (zero and number == 0)):
            raise argparse.ArgumentTypeError(f"{text!r} is not {said}{of_percent(text) if most == 1 else ''}")
        return number

    return read


def config_of(options: argparse.Namespace) -> RunConfig:
    from d2ft_hpc.launch.agree import AgreedError

    try:
        return read_config(options.config, options.overrides)
    except ConfigError as error:
        raise error from AgreedError()  # every rank reads the same configuration


def on_ranks(
    config: RunConfig,
    function: Callable[[Control, torch.device, str, Watch], int],
    signals: StopSignals | None = None,
) -> int:
    """Runs `function` on all ranks that the launcher started, watching each other, and returns the exit status."""
    from d2ft_hpc.launch import connect, detect, device_type_of, run_guarded

    environment = detect()
    asked = config.engine.device
    control = connect(environment, device_type=asked, timeout_seconds=config.launch.timeout_seconds)

    import torch  # large: after the ranks have met

    from d2ft_hpc.launch.caches import make_caches_usable
    from d2ft_hpc.launch.children import kill_children
    from d2ft_hpc.launch.watch import Watch

    device = torch.device(device_type_of(asked))
    make_caches_usable(tells=control.local_rank == 0)

    def run() -> int:
        try:
            with Watch(
                control,
                silence_seconds=config.launch.silence_seconds,
                stall_seconds=config.launch.stall_seconds,
                run_folder=config.run_folder,
                signals=signals,
            ) as watch:
                status = run_guarded(
                    control,
                    lambda: function(control, device, environment.launcher, watch),
                    run_folder=config.run_folder,
                    before_abort=watch.fail,
                )
        finally:
            # Whatever they were at, nobody wants it; and Python's own end would wait for ever for one that is left, as
            # it asks it to end by a signal that workers block.
            kill_children()
        if control.world_size > 1:
            # Nobody watches the interpreter's own end any more, which takes a while: a rank that hung in it would
            # keep the launcher, and so the job, waiting.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
        return status

    return run_guarded(control, run, run_folder=config.run_folder)
