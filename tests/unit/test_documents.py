"""What the documents say is there and is so: links, snippets, the key reference, the numbers of the results."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from d2ft_hpc.config import RunConfig
from d2ft_hpc.planning.table import PLANNERS
from tests import key_reference

REPOSITORY = Path(__file__).parents[2]
README = REPOSITORY / "README.md"
EXAMPLES = REPOSITORY / "tests" / "examples"
FOLDERS = ("analysis", "configs", "d2ft_hpc", "slurm", "tests")
DOCUMENTS = sorted(
    [*REPOSITORY.glob("*.md"), *(path for folder in FOLDERS for path in (REPOSITORY / folder).rglob("*.md"))]
)


def anchors(document: Path) -> set[str]:
    """Those that GitHub gives the headings."""
    headings = re.findall(r"^#+ (.*)$", document.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_every_relative_link_leads_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", document.read_text()):
        if re.match(r"\w+:", target):
            continue
        name, _, anchor = target.partition("#")
        found = (document.parent / name).resolve() if name else document
        assert found.exists(), target
        assert found.is_relative_to(REPOSITORY), target
        if anchor:
            assert anchor in anchors(found), target


def test_the_readme_is_short() -> None:
    text = README.read_text()
    assert len(text.splitlines()) <= 150
    assert len(text.encode()) <= 11_000


def test_before_a_release_every_target_runs() -> None:
    makefile = (REPOSITORY / "Makefile").read_text()
    targets = set(re.findall(r"^# make ([\w-]+)", makefile, re.MULTILINE))
    runs = set(re.findall(r"^check-all: (.*)$", makefile, re.MULTILINE)[0].split())
    # test-full begins with test; constraints writes down what test-newest ran with.
    assert targets - runs == {"test", "soak", "constraints", "check-all", "clean"}
    assert re.search(r"^check-all: .*\n\t\$\(MAKE\) soak ", makefile, re.MULTILINE)


def test_the_key_reference_is_current() -> None:
    assert (REPOSITORY / "configs" / "README.md").read_text() == key_reference.document()


def test_every_key_is_explained() -> None:
    for line in key_reference.document().splitlines():
        assert not line.endswith("|  |"), line


def test_imports_point_up_the_table_of_folders() -> None:
    """As the package's page says; what is imported for annotations alone does not count."""
    table = (
        (REPOSITORY / "d2ft_hpc" / "README.md").read_text().partition("| folder |")[2].partition("\n\n")[0]
    )
    order = [
        name
        for row in re.findall(r"^\| (`.*?`) \|", table, re.MULTILINE)
        for name in row.strip("`").split("`, `")
    ]
    folders = {path.parent.name for path in (REPOSITORY / "d2ft_hpc").glob("*/__init__.py")}
    assert sorted(order) == sorted(folders)
    place = {name: index for index, name in enumerate(order)}
    for source in sorted((REPOSITORY / "d2ft_hpc").glob("*/**/*.py")):
        folder, text = source.relative_to(REPOSITORY).parts[1], source.read_text()
        for block in re.findall(r"^if TYPE_CHECKING:\n(?:(?: .*)?\n)+", text, re.MULTILINE):
            text = text.replace(block, "")
        for imported in re.findall(r"^ *from d2ft_hpc\.(\w+)[\w.]* import", text, re.MULTILINE):
            assert place.get(imported, -1) <= place[folder], f"{source}: imports {imported}"


def test_pages_and_messages_name_keys_and_planners_that_exist() -> None:
    """Pages of `analysis` tell of keys as they were at the time, the change log of those that went."""
    keys = set(re.findall(r"^\| `([\w.]+)` \|", key_reference.document(), re.MULTILINE))
    sections = {key.rpartition(".")[0] for key in keys}
    free = ("model.options.", "engine.deepspeed.")  # a library's own below them
    key = re.compile(rf"(?<![\w./])(?:{'|'.join(RunConfig.model_fields)})(?:\.[a-z_]+)+(?![\w/(])")
    pages = [path for path in DOCUMENTS if path.name != "CHANGELOG.md" and "analysis" not in path.parts]
    for page in pages:
        for name in key.findall(page.read_text()):
            is_file = name.rpartition(".")[2] in ("safetensors", "jsonl", "py", "sh", "h5", "yaml")
            assert is_file or name in keys | sections or name.startswith(free), f"{page}: {name}"
    for source in (*pages, *(REPOSITORY / "d2ft_hpc").rglob("*.py")):
        for planner in re.findall(r"planner=['\"]?([a-z]\w*)", source.read_text()):
            assert planner in {*PLANNERS, "planner", "settings"}, f"{source}: {planner}"


def test_the_readme_s_snippets_are_tested_examples() -> None:
    examples = [path.read_text() for path in sorted(EXAMPLES.iterdir()) if path.is_file()]
    for heading in ("From the command line", "In a DeepSpeed script", "In your own loop"):
        section = README.read_text().split(f"## {heading}\n")[1].partition("\n#")[0]
        snippets = re.findall(r"^```\w+\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
        assert snippets, heading
        for snippet in snippets:
            assert any(snippet in example for example in examples), (
                f"in no file of tests/examples:\n{snippet}"
            )


def numbers_in(text: str) -> set[float]:
    return {float(number) for number in re.findall(r"[-+]?\d+\.?\d*(?:[eE][-+]?\d+)?", text)}


def told_by(file: Path) -> str:
    """What a file of raw results holds, or what a script prints from such files."""
    if file.suffix != ".py":
        return file.read_text()
    module = ".".join(file.relative_to(REPOSITORY).with_suffix("").parts)
    command = [sys.executable, "-m", module]
    return subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True, text=True).stdout


def test_the_readme_s_results_stand_in_the_raw_results_that_it_names() -> None:
    """Each number with a decimal point of the table, as it is or in per cent, rounded as in the table."""
    section = README.read_text().split("<!-- results -->")[1].split("<!-- /results -->")[0]
    files = [README.parent / name for name in re.findall(r"\]\(([^)\s]+\.(?:jsonl?|py))\)", section)]
    assert files, "the table names no raw results"
    raw = set[float]().union(*(numbers_in(told_by(file)) for file in files))
    rows = [line for line in section.splitlines() if line.startswith("|")]
    quoted = [number for row in rows for number in re.findall(r"[-+]?\d+\.\d+", row)]
    assert len(quoted) > 5
    for text in quoted:
        digits = len(text.partition(".")[2])
        assert any(
            abs(round(number * factor, digits) - float(text)) < 1e-9 for number in raw for factor in (1, 100)
        ), f"{text} stands in none of {', '.join(str(file.relative_to(REPOSITORY)) for file in files)}"
