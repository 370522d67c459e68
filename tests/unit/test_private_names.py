"""What libraries do not document and this package uses: that it is there, means what it meant, and is on the list."""

from __future__ import annotations

import ast
import importlib.metadata
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from d2ft_hpc.engines import deepspeed_private as private
from d2ft_hpc.engines import private_names
from d2ft_hpc.engines.fsdp import _group
from d2ft_hpc.engines.private_names import NEWEST_TESTED, expect, newer_than_tested, replace
from d2ft_hpc.errors import LibraryError
from tests.private_names import PRIVATE_NAMES, PrivateName

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "d2ft_hpc"
FOLDERS = ("engines", "execution", "model", "parallel", "training", "user_loop")


@pytest.fixture(autouse=True, scope="module")
def _deepspeed() -> None:
    private.import_deepspeed()


@pytest.mark.parametrize("name", PRIVATE_NAMES, ids=lambda name: name.path)
def test_what_libraries_do_not_document_is_there_and_means_the_same(name: PrivateName) -> None:
    assert name.fault() is None


def test_a_name_that_is_gone_or_means_something_else_is_told() -> None:
    module = "deepspeed.runtime.pipe.engine"
    assert "no _gone" in str(PrivateName(f"{module}:PipelineEngine._gone").fault())
    assert "does not say" in str(
        PrivateName(f"{module}:PipelineEngine._INSTRUCTION_MAP", "self._gone[").fault()
    )
    assert "no BF17" in str(PrivateName("deepspeed.runtime.bf16_optimizer:BF17").fault())
    assert "bf17" in str(PrivateName("deepspeed.runtime.bf17:BF17").fault())
    assert PrivateName(f"{module}:PipelineEngine._gone", since="999").fault() is None


def _private_uses() -> Iterator[tuple[str, str]]:
    """Files, and the names with an underscore that they ask other objects for."""
    for path in (path for folder in FOLDERS for path in sorted((PACKAGE / folder).rglob("*.py"))):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and re.match("_[^_]", node.attr):
                yield path.name, node.attr
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("expect", "replace"):
                for argument in node.args[1:2]:
                    if isinstance(argument, ast.Constant):
                        yield path.name, str(argument.value)
            if isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("d2ft_hpc"):
                yield from ((path.name, each.name) for each in node.names if re.match("_[^_]", each.name))


def _own_names() -> set[str]:
    """All that the package itself defines or puts on its own objects."""
    found = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                found.add(node.name)
            targets = getattr(node, "targets", [getattr(node, "target", None)])
            for target in (part for each in targets if each is not None for part in ast.walk(each)):
                if isinstance(target, ast.Attribute) and getattr(target.value, "id", "") == "self":
                    found.add(target.attr)
                if isinstance(target, ast.Name):
                    found.add(target.id)
    return found


def test_all_private_names_that_are_used_are_on_the_list() -> None:
    listed = {name.path.replace(":", ".").rpartition(".")[2] for name in PRIVATE_NAMES}
    own = _own_names() | {"_d2ft", "_d2ft_ahead", "_d2ft_summed"}
    assert not {(file, name) for file, name in _private_uses() if name not in listed | own}


def test_the_newest_tested_versions_are_those_of_the_constraints() -> None:
    constraints = dict(
        line.split("==")
        for line in (ROOT / "tests" / "constraints.txt").read_text().splitlines()
        if "==" in line and not line.startswith("#")
    )
    assert {name: constraints[name] for name in NEWEST_TESTED} == NEWEST_TESTED


@pytest.mark.parametrize(
    ("installed", "said"), [("2.99.1+cu130", True), ("2.14.1+cpu", False), ("2.11.0", False)]
)
def test_a_library_that_is_newer_than_tested_is_said(
    monkeypatch: pytest.MonkeyPatch, installed: str, said: bool
) -> None:
    monkeypatch.setattr(private_names, "version", lambda name: installed)
    assert any(f"torch {installed} is newer than" in text for text in newer_than_tested(["torch"])) == said


def test_an_attribute_that_is_gone_is_neither_read_nor_set() -> None:
    import deepspeed

    scaler = deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler
    for use in (lambda: expect(scaler, "scale_now", "by which losses are scaled"),
                lambda: replace(scaler, "scale_now", 2.0, "by which losses are scaled")):  # fmt: skip
        with pytest.raises(LibraryError, match=r"has no scale_now, by which losses are scaled"):
            use()
    assert not hasattr(scaler, "scale_now")
    made = scaler(2.0**16, 2.0, 1000, 1.0, 2, False, dtype=torch.float16)
    with pytest.raises(
        LibraryError, match=rf"deepspeed {importlib.metadata.version('deepspeed')}: DynamicLossScaler"
    ):
        replace(made, "scale_now", 2.0, "by which losses are scaled")


class Renamed:
    """A DeepSpeed engine, or what belongs to one, in which a name is another."""

    def __init__(self, **others: object) -> None:
        self.__dict__ |= others

    def fp16_enabled(self) -> bool:
        return True

    def gradient_accumulation_steps(self) -> int:
        return 4


def test_a_loss_scale_that_is_not_found_is_not_1() -> None:
    assert private.loss_scale(Renamed(optimizer=SimpleNamespace(cur_scale=2.0**16))) == 2.0**14
    for use in (private.loss_scale, private.loss_scaler_numbers):
        with pytest.raises(LibraryError, match=r"in fp16"):
            use(Renamed(optimizer=SimpleNamespace(scale=2.0**16)))


def test_master_weights_that_are_not_found_are_not_the_low_precision_ones() -> None:
    model = nn.Linear(2, 3, bias=False).bfloat16()
    copy = model.weight.detach().float()
    groups = {"fp16_groups": [[model.weight]], "fp32_groups": [[copy]]}
    basic = object()
    kept = Renamed(optimizer=Renamed(**groups), basic_optimizer=basic)
    assert private.unpartitioned_master_weights(model, kept)["weight"] is copy
    stepped = Renamed(optimizer=basic, basic_optimizer=basic)
    assert private.unpartitioned_master_weights(model, stepped)["weight"] is model.weight
    for changed, said in (
        ({"fp16_groups": [[model.weight]]}, "has no fp32_groups"),
        ({"half_groups": [[model.weight]]}, "has no fp16_groups"),
        ({"fp16_groups": [], "fp32_groups": []}, "keeps no float32 copy of weight"),
        ({**groups, "fp32_groups": [[copy.bfloat16()]]}, "keeps no float32 copy of weight"),
    ):
        with pytest.raises(LibraryError, match=said):
            private.unpartitioned_master_weights(
                model, Renamed(optimizer=Renamed(**changed), basic_optimizer=basic)
            )


def test_a_pipelines_instructions_are_those_that_it_knows() -> None:
    from deepspeed.runtime.pipe import schedule

    engine = SimpleNamespace(_INSTRUCTION_MAP={schedule.ForwardPass: print})
    with pytest.raises(LibraryError, match="knows no instruction BackwardPass"):
        private._instruct(engine, {schedule.BackwardPass: print})
    with pytest.raises(LibraryError, match="has no _INSTRUCTION_MAP"):
        private._instruct(SimpleNamespace(), {schedule.BackwardPass: print})


def test_a_weight_that_is_spread_is_not_taken_for_an_empty_one() -> None:
    with pytest.raises(LibraryError, match="has no ds_tensor"), private.whole(nn.Parameter(torch.empty(0))):
        pass


def test_what_fsdp_records_is_all_there() -> None:
    record = SimpleNamespace(modules=(), reduce_grads=True, all_reduce_grads=True, mesh_info=None)
    block = SimpleNamespace(_get_fsdp_state=lambda: SimpleNamespace(_fsdp_param_group=record))
    assert _group(block) is record
    del record.reduce_grads
    with pytest.raises(LibraryError, match="has no reduce_grads, which says whether gradients are reduced"):
        _group(block)
