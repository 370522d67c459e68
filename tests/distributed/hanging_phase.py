"""The command line with a rank that hangs in a phase, named in HANGS_IN, as on a file system that does not answer."""

from __future__ import annotations

import os
import sys
from typing import Any, NoReturn

from d2ft_hpc.cli import main
from d2ft_hpc.launch import detect
from d2ft_hpc.training import loop
from d2ft_hpc.training.probe_scores import ProbeScores
from d2ft_hpc.training.run_log import RunLog
from d2ft_hpc.training.saver import CheckpointSaver


def hang(*_: Any, **__: Any) -> NoReturn:
    print("it hangs", flush=True)
    while True:
        os.read(os.pipe()[0], 1)


if __name__ == "__main__":
    if detect().rank == detect().world_size - 1:
        match os.environ["HANGS_IN"]:
            case "set-up":
                loop.set_up = hang
            case "evaluation":
                loop.evaluate = hang
            case "scoring":
                ProbeScores.measure = hang  # type: ignore[method-assign]
            case "saving a checkpoint":
                CheckpointSaver.save = hang  # type: ignore[method-assign]
                RunLog.note = lambda *_: None  # type: ignore[method-assign]
    sys.exit(main())
