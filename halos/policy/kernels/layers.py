"""The decoder layers of a model."""

from torch import nn


def repeated_layers(model: nn.Module) -> list[nn.Module]:
    """Return the decoder layers: the elements of the model's outermost lists of modules."""
    layers: list[nn.Module] = []
    for child in model.children():
        if isinstance(child, nn.ModuleList):
            # Lists of experts or of activations can hold modules without weights; those are not layers.
            layers += [layer for layer in child if any(True for _ in layer.parameters())]
        else:
            layers += repeated_layers(child)
    return layers
