"""D2FT: distributed dynamic fine-tuning of vision transformers on HPC clusters (arXiv 2504.12471)."""

from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "initialize": "d2ft_hpc.user_loop.initialize",
    "PipelineModule": "d2ft_hpc.user_loop.pipeline_module",
    "attach": "d2ft_hpc.user_loop.planned_loop",
    "prepare": "d2ft_hpc.user_loop.prepare",
}


def __getattr__(name: str) -> Any:
    """The functions and classes for users' own scripts, without which importing the package costs no torch."""
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_PUBLIC[name]), name)
