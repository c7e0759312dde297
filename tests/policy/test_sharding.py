"""What FSDP2 needs of a model before its shards have values; the rest is tested in ``tests/runs/test_fsdp.py``."""

from __future__ import annotations

import torch
from torch import nn

from halos.policy.sharding import materialise


def test_parameters_get_memory_and_buffers_keep_their_values() -> None:
    module = nn.BatchNorm1d(3)
    module.running_mean = torch.tensor([1.0, 2.0, 3.0])
    for name, parameter in list(module.named_parameters()):
        setattr(module, name, nn.Parameter(parameter.to("meta")))
    materialise(module, shards=torch.device("cpu"), buffers=torch.device("cpu"))
    assert {(p.device.type, p.shape) for p in module.parameters()} == {("cpu", (3,))}
    assert module.running_mean.tolist() == [1, 2, 3]
