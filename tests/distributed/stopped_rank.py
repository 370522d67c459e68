"""The command line on several ranks, where rank 1 is stopped while it loads torch, as a node that hangs stops it."""

from __future__ import annotations

import os
import signal
import sys
from importlib.abc import MetaPathFinder
from typing import Any

from d2ft_hpc.cli import main
from d2ft_hpc.launch import detect


class StopAtTorch(MetaPathFinder):
    def find_spec(self, name: str, *_: Any) -> None:
        if name == "torch":
            os.kill(os.getpid(), signal.SIGSTOP)


if __name__ == "__main__":
    if detect().rank == 1:
        sys.meta_path.insert(0, StopAtTorch())
    sys.exit(main())
