"""How benches of steps take turns."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch

from d2ft_hpc.bench.turns import alternate
from d2ft_hpc.errors import ConfigError


@pytest.mark.parametrize("names", ["ab", "abc", "abcd"])
def test_each_contender_is_as_often_early_as_late(names: str) -> None:
    ran: list[str] = []
    rounds = 2 * len(names)
    seconds = alternate(
        {name: partial(ran.append, name) for name in names}, rounds, torch.device("cpu"), warm_up=0
    )
    assert {name: len(of_name) for name, of_name in seconds.items()} == dict.fromkeys(names, rounds)
    for at_one_place in np.reshape(ran, (rounds, len(names))).T:
        assert sorted(at_one_place) == sorted(2 * names)


def test_one_step_of_each_is_refused() -> None:
    with pytest.raises(ConfigError, match="measure at least 2"):
        alternate({"a": lambda: None}, 1, torch.device("cpu"))
