"""Prints what users' own loops are told about their plans."""

from __future__ import annotations

from d2ft_hpc.launch import Control
from d2ft_hpc.lifecycle import PlanListener


class PlanPrinter(PlanListener):
    """Lines for the user, from rank 0."""

    def __init__(self, control: Control) -> None:
        self._control = control

    def say(self, text: str) -> None:
        if self._control.rank == 0:
            print(f"d2ft: {text}", flush=True)
