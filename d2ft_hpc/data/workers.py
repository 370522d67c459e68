"""How torch's data loaders start their worker processes here."""

from __future__ import annotations

import multiprocessing
from typing import Any

import torch


def worker_options(num_workers: int, *, persistent: bool = True) -> dict[str, Any]:
    """Options of torch's DataLoader: workers are never forked from this process (a fork after MPI_Init is undefined),
    and the caller's random state stays as it was."""
    # A generator of its own: otherwise each iteration would draw from the caller's.
    options: dict[str, Any] = {"num_workers": num_workers, "generator": torch.Generator()}
    if num_workers == 0:
        return options
    methods = multiprocessing.get_all_start_methods()
    context = "forkserver" if "forkserver" in methods else "spawn"
    return {**options, "multiprocessing_context": context, "persistent_workers": persistent}
