"""D2FT: distributed dynamic fine-tuning of vision transformers on HPC clusters (arXiv 2504.12471).

What `__all__` lists is stable: it changes with a new minor version, and is said then. All else may change any time.
Importing the package costs no torch; a name is loaded when it is first used. Names that are DeepSpeed's own come from
DeepSpeed, so that `import d2ft_hpc as deepspeed` is enough in a script that has them.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from d2ft_hpc.errors import (
    CheckpointError,
    ConfigError,
    D2ftError,
    DataError,
    LaunchError,
    PlanError,
    ResultsError,
    UnsupportedModelError,
)

if TYPE_CHECKING:
    from d2ft_hpc.planning.plan import Operation, SkipPlan
    from d2ft_hpc.user_loop.initialize import initialize
    from d2ft_hpc.user_loop.pipeline_module import PipelineModule
    from d2ft_hpc.user_loop.planned_loop import PlannedLoop, attach
    from d2ft_hpc.user_loop.prepare import prepare

__version__ = "0.2.0"

_PLACES = {
    "Operation": "planning.plan",
    "PipelineModule": "user_loop.pipeline_module",
    "PlannedLoop": "user_loop.planned_loop",
    "SkipPlan": "planning.plan",
    "attach": "user_loop.planned_loop",
    "initialize": "user_loop.initialize",
    "prepare": "user_loop.prepare",
}

__all__ = [
    "CheckpointError",
    "ConfigError",
    "D2ftError",
    "DataError",
    "LaunchError",
    "Operation",
    "PipelineModule",
    "PlanError",
    "PlannedLoop",
    "ResultsError",
    "SkipPlan",
    "UnsupportedModelError",
    "attach",
    "initialize",
    "prepare",
]


def __getattr__(name: str) -> Any:
    if name in _PLACES:
        return getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)
    # Python asks for a module of ours here before it imports it.
    if name.startswith("__") or find_spec(f"{__name__}.{name}") is not None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(import_module("deepspeed"), name)
    except (ImportError, AttributeError):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}, nor has deepspeed") from None
