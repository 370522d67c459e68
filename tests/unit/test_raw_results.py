"""The raw results under analysis/ that texts stand on can be read, and the commands that made them are there."""

from __future__ import annotations

import importlib.util
import json
import re
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


def test_every_documented_experiment_can_be_started() -> None:
    pages = (ANALYSIS.parent / "d2ft_hpc").rglob("*.md")
    texts = [ANALYSIS.parent / "README.md", *pages, *ANALYSIS.rglob("*.md"), *ANALYSIS.rglob("*.py")]
    named = {name for text in texts for name in re.findall(r"\banalysis(?:\.\w+)+", text.read_text())}
    modules = {name for name in named if not name.endswith((".md", ".py"))}
    assert len(modules) > 8
    for name in modules:
        assert importlib.util.find_spec(name), name
