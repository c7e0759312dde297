"""Which modules are the decoder layers: those that are divided and compiled one by one."""

from __future__ import annotations

import pytest
from torch import nn

from halos.policy.kernels.layers import repeated_layers
from tests import tiny


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_the_decoder_layers_are_found_in_the_model_itself(architecture: str) -> None:
    layers = repeated_layers(tiny.model(architecture))
    assert len(layers) == 2
    assert len({type(layer) for layer in layers}) == 1
    assert "Layer" in type(layers[0]).__name__ or "Block" in type(layers[0]).__name__


def test_lists_within_layers_stay_whole() -> None:
    experts = nn.ModuleList([nn.Linear(2, 2) for _ in range(3)])
    layers = nn.ModuleList([nn.ModuleDict({"experts": experts}), nn.Linear(2, 2)])
    assert repeated_layers(nn.Sequential(layers, nn.ModuleList([nn.ReLU()]))) == list(layers)
