"""How many of its host's cores a rank has."""

from __future__ import annotations

import os

from d2ft_hpc.launch.control import Control, gathered


def own_cores() -> list[int]:
    """The cores that this process may run on, by their numbers."""
    return sorted(os.sched_getaffinity(0))


def share_of_cores(control: Control) -> float:
    """This rank's cores, each divided by the number of ranks on its host that may run there: launchers bind ranks to
    cores of their own, or leave all of them to all. All ranks call it together."""
    own = own_cores()
    of_ranks = zip(control.hosts, gathered(control, own), strict=True)
    neighbours = [set(cores) for host, cores in of_ranks if host == control.host]
    return sum(1 / sum(core in cores for cores in neighbours) for core in own)
