"""Runs the quick checks of several modules on one set of ranks; the arguments are the modules' names."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any

from d2ft_hpc.launch import Control
from tests.distributed.engine_checks import run_checks
from tests.distributed.launching import Choice


def checks(modules: list[str]) -> Callable[[int, Choice], dict[str, Callable[[Control], Any]]]:
    """The checks of all modules by name, with the module's name and a blank in front."""

    def of_all(world_size: int, choice: Choice) -> dict[str, Callable[[Control], Any]]:
        return {
            f"{module} {name}": check
            for module in modules
            for name, check in import_module(module).checks(world_size, choice).items()
        }

    return of_all


if __name__ == "__main__":
    modules = sys.argv[1:]
    sys.argv[1:] = ["quick"]
    sys.exit(run_checks(checks(modules)))
