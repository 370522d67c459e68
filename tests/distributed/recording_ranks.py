"""Ranks that record steps: python recording_ranks.py FOLDER.

Rank 1 adds nothing until rank 0 has added all of its steps, so the run ends only if recording waits for nobody.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch

from d2ft_hpc.launch import connect, detect
from d2ft_hpc.metering.phases import phase, timed_step
from d2ft_hpc.recording.step_recorder import StepRecord, StepRecorder
from d2ft_hpc.results import ResultsWriter

STEPS = 30
folder = Path(sys.argv[1])
control = connect(detect(), device_type="cpu")
writer = ResultsWriter(folder / "results.h5") if control.rank == 0 else None
recorder = StepRecorder(control, writer)
if control.rank == 1:
    deadline = time.monotonic() + 60
    while not (folder / "rank 0 is done").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
for step in range(STEPS):
    with timed_step(torch.device("cpu")) as times, phase("forward"):
        pass
    figures = {"rank_samples": 4.0, "dense_flops": 100.0 * step + control.rank}
    loss = torch.tensor(float(control.rank))
    recorder.add(StepRecord(step, 0, 0, 0.1, float("nan"), loss, times, figures))
if control.rank == 0:
    (folder / "rank 0 is done").touch()
recorder.finish()
if writer is not None:
    writer.close()
control.close()
