"""Settings of all tests."""

from __future__ import annotations

from hypothesis import settings

# The same examples every time, so that a run's result is its code's alone;
# --hypothesis-profile=default --hypothesis-seed=N tries others.
settings.register_profile("reproducible", derandomize=True)
settings.load_profile("reproducible")
