"""One folder knows what models and their blocks are made of."""

from __future__ import annotations

import re
from pathlib import Path

import d2ft_hpc

PACKAGE = Path(d2ft_hpc.__file__).parent
ELSEWHERE = ("families/", "demo/model.py", "bench/")
"""The demo's model is one of timm's; benches time models of timm."""


def lines_with(pattern: str) -> list[str]:
    return [
        f"{path.relative_to(PACKAGE)}: {line.strip()}"
        for path in sorted(PACKAGE.rglob("*.py"))
        if not path.relative_to(PACKAGE).as_posix().startswith(ELSEWHERE)
        for line in path.read_text().splitlines()
        if re.search(pattern, line)
    ]


def test_no_other_file_names_a_librarys_classes_or_reaches_into_a_block() -> None:
    assert lines_with(r"\b(VisionTransformer|Eva|timm\.models|timm\.layers)\b") == []
    assert lines_with(r"\b(ViT|D[iI][nN][oO]v\d|CLIP|Siglip|Llama|Qwen\d)[A-Z]\w+|transformers\.models") == []
    assert lines_with(r"\w\.(attn|mlp|ls1|ls2|patch_embed|pos_embed|forward_head)\b") == []
    assert lines_with(r"[\"']blocks\.") == []


def test_families_import_nothing_but_errors() -> None:
    imports = [
        line
        for path in (PACKAGE / "families").glob("*.py")
        for line in path.read_text().splitlines()
        if re.search(r"(from|import) d2ft_hpc", line)
    ]
    assert all(re.search(r"d2ft_hpc\.(families[. ]|errors )", line) for line in imports)
