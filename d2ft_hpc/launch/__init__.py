"""Ranks, rendezvous and agreement between ranks. Only `connect` imports MPI and torch, when it is called."""

from d2ft_hpc.launch.agree import agreed, run_guarded, share
from d2ft_hpc.launch.connect import connect, device_type_of
from d2ft_hpc.launch.control import Control, gathered
from d2ft_hpc.launch.environment import LaunchEnvironment, detect

__all__ = [
    "Control",
    "LaunchEnvironment",
    "agreed",
    "connect",
    "detect",
    "device_type_of",
    "gathered",
    "run_guarded",
    "share",
]
