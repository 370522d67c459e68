"""The raw results under analysis/ that texts stand on can be read, and the commands that made them are there."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import pytest

from analysis.scaling import simulate

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


def test_the_simulation_of_many_gpus_has_the_bytes_counted_on_two_and_their_ratio_under_ddp() -> None:
    ddp, *others = simulate.check()
    assert ddp["bytes"] == ddp["counted_bytes"] == 340_254_760
    assert [each["bytes"] / each["counted_bytes"] for each in others] == pytest.approx([1, 1], rel=3e-3)
    low, high = ddp["over_dense"]
    assert low < ddp["measured_over_dense"] < high < low + 0.01
    assert ddp["measured_dense_seconds"] == pytest.approx(ddp["dense_seconds"][1], rel=0.02)


def test_at_8_gpus_a_node_the_simulated_links_are_those_of_the_specifications() -> None:
    every_gpu_a_card, one_card, _ = simulate.NETWORKS
    gigabyte = 1e9
    ring = 2 * 4095 / 4096 * gigabyte
    latency = 2 * (3 * 3.4e-6 + 9 * 14e-6)
    assert every_gpu_a_card.all_reduce(gigabyte, 4096) == pytest.approx(ring / (0.8 * 400e9) + latency)
    assert one_card.all_reduce(gigabyte, 4096) == pytest.approx(ring / (0.8 * 50e9) + latency)
    assert one_card.all_reduce(gigabyte, 8) == pytest.approx(2 * 7 / 8 / (0.8 * 450) + 2 * 3 * 3.4e-6)
    four_rings = one_card.all_reduce(gigabyte, 1024, rings=4)
    assert four_rings == pytest.approx(2 * 1023 / 1024 / (0.8 * 50 / 4) + 2 * (3.4e-6 + 9 * 14e-6))
