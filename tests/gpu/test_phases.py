"""Times of a step's phases on a GPU, taken without waiting for it."""

from __future__ import annotations

import pytest
import torch

from d2ft_hpc.metering.memory import reset_peak, used_bytes
from d2ft_hpc.metering.phases import phase, timed_step
from d2ft_hpc.recording.step_recorder import on_host

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def test_nothing_waits_for_the_gpu() -> None:
    device = torch.device("cuda")
    matrix = torch.randn(4096, 4096, device=device)
    torch.empty(1, pin_memory=True)
    torch.cuda.synchronize()
    reset_peak(device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        with timed_step(device) as times:
            with phase("forward"):
                for _ in range(200):
                    matrix = (matrix @ matrix).clamp(-1, 1)
            with phase("optimizer"):
                matrix = matrix + 1
            loss = on_host(matrix.mean())
        was_ready = times.ready
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not was_ready  # 200 products are queued, not done
    seconds = times.seconds()
    assert times.ready
    assert seconds["forward"] > seconds["optimizer"] > 0
    assert sum(seconds.values()) >= seconds["forward"] + seconds["optimizer"]
    assert float(loss) == pytest.approx(float(matrix.mean()))
    assert used_bytes(device) >= 2 * matrix.nbytes
