"""Settings of all tests."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator

import pytest
from hypothesis import settings

# The same examples every time, in whatever time they take, so that a run's result is its code's alone;
# --hypothesis-profile=default --hypothesis-seed=N tries others.
settings.register_profile("reproducible", derandomize=True, deadline=None)
settings.load_profile("reproducible")


@pytest.fixture(autouse=True)
def nothing_is_counted_any_more() -> Iterator[None]:
    """By a loop that a test left in the middle of a batch, nor kept from torch.compile."""
    yield
    module = sys.modules.get("d2ft_hpc.user_loop.batch_counter")
    if module is not None:
        module.BatchCounter.end_others()
        sys.modules["torch"].compiler.set_stance("default")


@pytest.fixture(autouse=True)
def nobody_is_watched_any_more() -> Iterator[None]:
    """A watch that a test left would find the process hanging ten minutes later, and end it in another test."""
    yield
    assert "watch" not in {thread.name for thread in threading.enumerate()}
