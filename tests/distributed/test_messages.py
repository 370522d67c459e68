"""The message model against what DeepSpeed's engines send on real ranks (message_checks.py is what the ranks run)."""

from __future__ import annotations

from collections import Counter

import pytest

from tests.distributed.launching import results_of


def test_the_message_model_tells_what_deepspeed_sends() -> None:
    for engine, found in results_of("tests.distributed.message_checks", ranks=2).items():
        counted = Counter[str]()
        for name, sent in found["counted"].items():
            counted[name.removesuffix("_base")] += sent
        assert set(counted) == set(found["told"]), engine
        for name, told in found["told"].items():
            assert counted[name] == pytest.approx(told, rel=1e-3), (
                engine,
                name,
            )  # DeepSpeed pads to whole parts
