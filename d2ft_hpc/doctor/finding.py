"""What a check found."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Literal

from d2ft_hpc.launch import Control, gathered
from d2ft_hpc.launch.control import describe_ranks
from d2ft_hpc.safe_text import one_line


@dataclass(frozen=True)
class Finding:
    check: str
    status: Literal["ok", "warning", "failed"]
    text: str
    fix: str = ""


def of_error(check: str, error: Exception, fix: str) -> Finding:
    """Our errors say what to do in their last sentence or clause; `fix` is for errors of other libraries."""
    text, mark, own_fix = str(error).partition(". ")
    if not mark:
        text, _, own_fix = str(error).rpartition("; ")
    return Finding(check, "failed", (text or str(error)).strip(), (own_fix if text else "").strip() or fix)


def of_all_ranks(control: Control, own: Sequence[Finding]) -> list[Finding]:
    """The findings of all ranks. Equal ones appear once, with the ranks that made them unless all did. All ranks
    return the same."""
    ranks_of: dict[Finding, list[int]] = {}
    for rank, of_rank in enumerate(gathered(control, [asdict(finding) for finding in own])):
        for finding in of_rank:
            ranks_of.setdefault(Finding(**finding), []).append(rank)
    return [
        finding
        if len(ranks) == control.world_size
        else replace(finding, text=f"{describe_ranks(ranks, control.hosts)}: {finding.text}")
        for finding, ranks in ranks_of.items()
    ]


def as_text(findings: Sequence[Finding]) -> str:
    lines = []
    for finding in findings:
        lines.append(f"{finding.status:8} {finding.check:10} {one_line(finding.text)}")
        if finding.fix:
            lines.append(f"{'':19} fix: {one_line(finding.fix)}")
    return "\n".join(lines)


def as_json(findings: Sequence[Finding]) -> str:
    """One line: {"findings": [{"check", "status", "text", "fix"}, ...], "failed": number}."""
    failed = sum(finding.status == "failed" for finding in findings)
    return json.dumps({"findings": [asdict(finding) for finding in findings], "failed": failed})
