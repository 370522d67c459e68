"""The experiment with text runs in small: fine-tuning lowers held-out loss, plans keep their budgets; and its table
chooses rates on the validation part and pairs by seed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from analysis.text import table

Line = dict[str, Any]


def line(contender: str, budget: float, rate: float, seed: int, validation: float, test: float) -> Line:
    return {
        "contender": contender,
        "budget": budget,
        "rate": rate,
        "seed": seed,
        "flops": 1000 * budget,
        "bits": {"validation": validation, "test": test},
        "accuracy": {"validation": 0.0, "test": 0.5 - test / 100},
    }


def test_the_rate_is_that_of_the_validation_part_and_seeds_are_paired() -> None:
    low, middle, high = table.RATES
    search = [
        line(*contender, rate, table.SEARCH_SEED, bits, 9 - bits)
        for contender in (("dense", 1.0), ("samples", 0.6))
        for rate, bits in ((low, 3.0), (middle, 2.0), (high, 2.5))
    ]
    finals = [
        line(*contender, rate, seed, 0.0, seed + more)
        for seed, more in zip(table.SEEDS, (0.1, 0.2, 0.3), strict=True)
        for contender, rate, more in (
            (("dense", 1.0), middle, 0.0),
            (("samples", 0.6), middle, more),
            (("samples", 0.6), high, 5.0),  # not the best rate
        )
    ]
    wanted = [("dense", 1.0, middle, seed) for seed in (*table.SEEDS, 7)]
    assert table.best_rates(search) == {("dense", 1.0): middle, ("samples", 0.6): middle}
    assert table.best_rates(search[1:]) == {("samples", 0.6): middle}
    assert [*table.missing(finals, wanted)] == [f"--contender dense --budget 1 --rate {middle:g} --seed 7"]
    found = "\n".join(table.rows([*search, *finals]))
    # Mean of the differences 0.1, 0.2, 0.3, and 2.92 standard errors of 0.0577 more.
    assert "| `samples` | 0.6 | +0.2000 | +0.3686 | -0.20 | -0.37 |" in found
    assert f"| `samples` | 0.6 | 0.600 | {middle:g} | 2.2000 ± 1.1000 | 47.80 ± 1.10 | 3 |" in found


@pytest.mark.full
def test_in_small_fine_tuning_helps_and_both_planners_keep_their_budget(tmp_path: Path) -> None:
    pytest.importorskip("transformers", minversion="5.0")
    from analysis.text import train

    results = tmp_path / "results.jsonl"

    def run(command: str, settings: str) -> None:
        options = train.parser().parse_args([command, str(tmp_path), str(results), *settings.split()])
        options.run(options)

    run("pretrain", "--layers 2 --width 64 --tokens 64 --steps 60 --batch 16 --rate 3e-3 --tested 100")
    for contender in ("dense --budget 1", "samples --budget 0.6", "static --budget 0.6"):
        run("finetune", f"--contender {contender} --rate 2e-3 --sequences 500 --tested 100")
    before, dense, samples, static = table.read_lines(results)
    assert dense["bits"]["test"] < before["bits"]["test"] - 0.2
    assert samples["bits"]["test"] < before["bits"]["test"] - 0.1
    assert 0.5 < samples["flops"] / dense["flops"] <= 0.6
    one_dense_step_more = (0.4 + 0.4) / (3 * 500 / 25)  # and its scores
    assert 0.5 < static["flops"] / dense["flops"] <= 0.6 + one_dense_step_more
