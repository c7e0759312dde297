"""What FSDP2 needs of a model before its shards have values; the rest is tested in ``tests/runs/test_fsdp.py``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from halos.sharding.sharding import load_full_state, materialise


def test_parameters_get_memory_and_buffers_keep_their_values() -> None:
    module = nn.BatchNorm1d(3)
    module.running_mean = torch.tensor([1.0, 2.0, 3.0])
    for name, parameter in list(module.named_parameters()):
        setattr(module, name, nn.Parameter(parameter.to("meta")))
    materialise(module, shards=torch.device("cpu"), buffers=torch.device("cpu"))
    assert {(p.device.type, p.shape) for p in module.parameters()} == {("cpu", (3,))}
    assert module.running_mean.tolist() == [1, 2, 3]


def test_a_state_is_handed_out_where_the_weights_are(monkeypatch: pytest.MonkeyPatch) -> None:
    module = nn.BatchNorm1d(2, device="meta")
    module._buffers["running_mean"] = torch.zeros(2)

    def load(given: nn.Module, state: Any, options: Any) -> None:
        assert {buffer.device.type for buffer in given.buffers()} == {"meta"}
        given._buffers["running_mean"] = torch.ones(2)  # no values come back from where there are none

    monkeypatch.setattr("halos.sharding.sharding.set_model_state_dict", load)
    load_full_state(module, {})
    assert module.running_mean.device.type == "cpu"
    assert module.running_var.device.type == "meta"
