"""Blocks of every kind under plans on a GPU against the same on a CPU, eagerly and compiled."""

from __future__ import annotations

import copy

import pytest
import torch

from d2ft_hpc.families.table import backbone_of, family_of
from tests.unit.test_narrow import MODELS, rows, trained

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("compile", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("kind", sorted(MODELS.keys() - {"drop path"}))  # whose random numbers differ
def test_gradients_equal_those_of_a_cpu(kind: str, compile: bool) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    torch._dynamo.reset()
    model = MODELS[kind]()
    backbone = backbone_of(model)
    for row in rows(len(family_of(backbone).blocks(backbone))):
        expected = trained(copy.deepcopy(model), row, compile=False)
        found = trained(copy.deepcopy(model).cuda(), row, compile=compile)
        for name, gradient in expected[1].items():
            atol = 1e-5 * float(gradient.abs().max()) + 1e-6
            torch.testing.assert_close(found[1][name].cpu(), gradient, rtol=1e-3, atol=atol, msg=name)
    torch._dynamo.reset()
