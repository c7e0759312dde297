"""The decoder layers of a model."""

from __future__ import annotations

from torch import nn


def repeated_layers(model: nn.Module) -> list[nn.Module]:
    """The decoder layers: the elements of the outermost lists of modules that the model has."""
    found: list[nn.Module] = []
    for child in model.children():
        if isinstance(child, nn.ModuleList):
            found += [layer for layer in child if any(True for _ in layer.parameters())]
        else:
            found += repeated_layers(child)
    return found
