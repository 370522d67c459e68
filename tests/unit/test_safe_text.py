"""What others wrote reaches messages, terminals and files without secrets and without commands to the terminal."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from d2ft_hpc.cli import main
from d2ft_hpc.errors import ConfigError
from d2ft_hpc.launch import run_guarded
from d2ft_hpc.safe_text import one_line, printable, scrubbed, shown
from d2ft_hpc.training import run_folder


@pytest.mark.parametrize(
    ("text", "safe"),
    [
        ("ALL,HF_TOKEN=hf_abc,OMP_NUM_THREADS=2", "ALL,HF_TOKEN=***,OMP_NUM_THREADS=2"),
        ("AWS_SECRET_ACCESS_KEY=a/b+c MY_PASSWORD=x;", "AWS_SECRET_ACCESS_KEY=*** MY_PASSWORD=***;"),
        ("http://me:pw@proxy:3128 and https://host/x", "http://***@proxy:3128 and https://host/x"),
        ("http://me:p@ss@w@proxy:3128/x@y", "http://***@proxy:3128/x@y"),
        (
            "no such file https:/me:pw@host/x, as a path has it",
            "no such file https:/***@host/x, as a path has it",
        ),
        ("s3://key@bucket", "s3://***@bucket"),
        ("https://host/x?token=abc&y=1", "https://host/x?token=***&y=1"),
        ("Bearer hf_abcdefghijklmnop", "Bearer ***"),
        ("ghp_0123456789abcdef0123 sk-0123456789abcdef", "*** ***"),
        ("eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.abcDEF", "***"),
        ("model.options={'class_token': False}", "model.options={'class_token': False}"),
        ("sorted(x, key=len); KeyError: 'token'", "sorted(x, key=len); KeyError: 'token'"),
    ],
)
def test_secrets_are_struck_out(text: str, safe: str) -> None:
    assert scrubbed(text) == safe


def test_terminals_get_no_commands() -> None:
    assert printable("a\x1b[31m\x9b\x07\tb\u202e\nc\udcff é") == "a\\x1b[31m\\x9b\\x07\tb\\u202e\nc\\udcff é"
    assert one_line("a\nb\x1b]0;c\x07") == "a b\\x1b]0;c\\x07"


def test_long_values_are_cut() -> None:
    assert shown("x" * 10_000).startswith("'xxx")
    assert len(shown("x" * 10_000)) < 100


def test_messages_and_their_files_are_safe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("D2FT_FAILURE_FILE", str(tmp_path / "failure"))

    def fault() -> None:
        raise ConfigError("key \x1b[31m at http://me:pw@host")

    def bug() -> None:
        raise AttributeError("HF_TOKEN=planted \x1b[31m")

    assert run_guarded(None, fault) == 1
    assert (tmp_path / "failure").read_text() == "key \\x1b[31m at http://***@host\n"
    assert capfd.readouterr().err == "d2ft-hpc: error: key \\x1b[31m at http://***@host\n"
    assert run_guarded(None, bug, run_folder=tmp_path) == 1
    traceback = (tmp_path / "errors" / "rank-0.txt").read_text()
    assert "planted" not in capfd.readouterr().err + traceback
    assert "HF_TOKEN=*** \\x1b[31m" in traceback


def test_logs_are_safe(tmp_path: Path) -> None:
    root = logging.getLogger()
    handlers = list(root.handlers)
    run_folder.open_log(tmp_path, 0)
    try:
        logging.getLogger("d2ft_hpc").warning("HF_TOKEN=planted \x1b[31m")
    finally:
        for handler in set(root.handlers) - set(handlers):
            root.removeHandler(handler)
        logging.captureWarnings(False)
    assert (tmp_path / "logs" / "rank-0.log").read_text().endswith("HF_TOKEN=*** \\x1b[31m\n")


def test_keys_of_a_file_reach_the_terminal_escaped(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    demo = Path("configs/demo.yaml").resolve()
    (tmp_path / "evil.yaml").write_text(f'base: {demo}\nrun: {{"\\e[2J": "\\e[31m"}}\n')
    assert main(["train", str(tmp_path / "evil.yaml")]) == 1
    told = capfd.readouterr().err
    assert "\x1b" not in told
    assert told.startswith("d2ft-hpc: error: run.\\x1b[2J: unknown key")
