"""Waiting for a gather."""

from __future__ import annotations

import time

from d2ft_hpc.launch.async_gather import wait_for


class EndsLater:
    """A gather that ends after so many seconds, and counts how often somebody looks."""

    def __init__(self, seconds: float) -> None:
        self.end, self.looks = time.monotonic() + seconds, 0

    def poll(self) -> bytes | None:
        self.looks += 1
        return b"all" if time.monotonic() > self.end else None


def test_who_waits_for_a_gather_looks_seldom_and_is_hardly_late() -> None:
    """Ranks that share cores would else keep each other from the work that they wait for."""
    gather, started = EndsLater(0.5), time.monotonic()
    assert wait_for(gather, 10) == b"all"
    assert time.monotonic() - started < 0.7
    assert gather.looks < 100
    assert wait_for(EndsLater(10), 0.1) is None
