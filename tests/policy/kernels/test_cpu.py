"""All CPU kernels through one call."""

from __future__ import annotations

import os

import pytest
import torch
from torch import nn

from halos.policy.kernels import matmul
from halos.policy.kernels.cpu import use_cpu_kernels
from halos.policy.kernels.elementwise import lean_modules
from halos.policy.kernels.matmul import CACHES, MAX_KERNELS, Linear
from tests import tiny


def test_one_call_limits_the_caches_and_changes_products_norms_and_gated_layers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for variable in CACHES:
        monkeypatch.setenv(variable, "0")  # so that the variable is restored afterwards
        monkeypatch.delenv(variable)
    monkeypatch.setattr(matmul, "onednn_is_faster", lambda: True)
    model = tiny.model()
    plain = [module for module in model.modules() if type(module) is nn.Linear]
    use_cpu_kernels(model)
    assert [os.environ[variable] for variable in CACHES] == [str(MAX_KERNELS)] * len(CACHES)
    assert plain
    assert all(type(module) is Linear for module in plain)
    lean = list(lean_modules(model))
    assert lean
    assert all(type(module) is kind for module, kind in lean)


def test_logits_stay_the_same_to_the_bit_where_onednn_is_not_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matmul, "onednn_is_faster", lambda: False)
    model = tiny.model().eval()
    ids = torch.tensor([[1, 2, 3, 4, 5]])
    before = model(input_ids=ids).logits
    use_cpu_kernels(model)
    assert torch.equal(model(input_ids=ids).logits, before)
