"""A decoder of transformers on 2 ranks, by every way of sharing it (decoder_ranks.py is what the ranks run)."""

from __future__ import annotations

import pytest

from tests.distributed.launching import results_of

pytest.importorskip("transformers", minversion="5.24")
pytestmark = pytest.mark.full


def test_parameters_equal_one_process() -> None:
    found = results_of("tests.distributed.decoder_ranks", ranks=2)
    assert len(found) == 14
    for name, difference in found.items():
        assert difference < 1e-6, name
