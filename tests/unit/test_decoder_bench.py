"""The bench of decoders runs, here in small and without kernels being made."""

from __future__ import annotations

import pytest
import torch

from analysis.engines import decoder


@pytest.mark.full
def test_a_small_decoder_is_timed_under_both_plans() -> None:
    pytest.importorskip("transformers", minversion="5.24")
    sizes = {
        "layers": 2,
        "width": 512,
        "vocabulary": 100,
        "tokens": 8,
        "samples": 4,
        "micro-batches": 1,
        "steps": 2,
    }
    options = decoder.parser().parse_args([f"--{name}={size}" for name, size in sizes.items()])
    with torch.compiler.set_stance("force_eager"):
        found = decoder.compare(options)
    assert found["over_dense"].keys() == {"static", "samples"}
    assert found["dense"].startswith("dense, compiled")
    for text in found["reports"].values():
        assert "58." in text or "59." in text, text
    assert "Llama of 0.0" in decoder.report(found)
