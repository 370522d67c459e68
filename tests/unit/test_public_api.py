"""What users' scripts may rely on."""

import subprocess
import sys

import pytest

import d2ft_hpc

STABLE = {
    "CheckpointError",
    "ConfigError",
    "D2ftError",
    "DataError",
    "LaunchError",
    "Operation",
    "PipelineModule",
    "PlanError",
    "PlannedLoop",
    "ResultsError",
    "SkipPlan",
    "UnsupportedModelError",
    "attach",
    "initialize",
    "prepare",
}


def test_the_stable_names_are_these_and_each_is_there() -> None:
    assert set(d2ft_hpc.__all__) == STABLE
    for name in STABLE:
        assert getattr(d2ft_hpc, name).__name__ == name


def test_importing_the_package_costs_neither_torch_nor_deepspeed() -> None:
    code = (
        "import sys, d2ft_hpc; from d2ft_hpc import errors; "
        "assert not {'torch', 'deepspeed'} & set(sys.modules); print(d2ft_hpc.__version__)"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == d2ft_hpc.__version__


def test_every_public_name_of_deepspeed_is_there_where_it_is_imported_instead() -> None:
    from d2ft_hpc.engines.deepspeed_private import import_deepspeed

    deepspeed = import_deepspeed()
    names = [name for name in dir(deepspeed) if not name.startswith("_")]
    assert {"add_config_arguments", "init_distributed", "zero", "comm"} < set(names)
    for name in names:
        if name not in STABLE:
            assert getattr(d2ft_hpc, name) is getattr(deepspeed, name)


def test_a_name_that_neither_has_is_told() -> None:
    with pytest.raises(AttributeError, match="no attribute 'inicialize', nor has deepspeed"):
        d2ft_hpc.inicialize  # noqa: B018
