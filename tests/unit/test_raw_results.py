"""The raw results under analysis/ that its texts stand on can be read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

ANALYSIS = Path(__file__).parents[2] / "analysis"


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_every_file_holds_values(suffix: str) -> None:
    files = sorted(ANALYSIS.rglob(f"*{suffix}"))
    assert files
    for file in files:
        text = file.read_text()
        assert [json.loads(part) for part in (text.splitlines() if suffix == ".jsonl" else [text])], file
