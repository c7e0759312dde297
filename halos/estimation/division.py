"""What ``ddp`` and ``fsdp`` divide over devices, and what they add on each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from halos.policy.backbone import Backbone
from halos.policy.kernels.layers import repeated_layers

WHOLE_GRADIENTS, GATHERED, EXCHANGE = "gradients not divided yet", "gathered weights", "exchange"
"""Labels of what FSDP2 holds for a while: gradients of embeddings and head, weights of all devices, buffers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Division:
    """How the model is divided.

    Attributes:
        devices: of the whole run.
        shards: devices over which the weights are divided.
        ddp: whether gradients are exchanged in buckets.
        compute_dtype: precision to which FSDP2 casts gathered weights; None: their own.
        reshard, offload, whole_gradients: ``reshard_after_forward``, ``cpu_offload`` and ``defer_gradient_sync`` of
            :class:`halos.sharding.FSDP`.
    """

    devices: int = 1
    shards: int = 1
    ddp: bool = False
    compute_dtype: torch.dtype | None = None
    reshard: bool = True
    offload: bool = False
    whole_gradients: bool = False

    @property
    def divides(self) -> bool:
        return self.shards > 1

    def shares(self, stored: torch.dtype, traced: torch.dtype) -> dict[str, float]:
        """Return the part of the traced bytes that a device holds, by label.

        Args:
            stored: precision of the weights that the optimizer changes.
            traced: precision in which they are traced.
        """
        share = stored.itemsize / traced.itemsize / self.shards
        labels = ("weights", "reference", "gradients", "optimizer", "update")
        return dict.fromkeys(labels, 0.0 if self.offload else share)

    def keeps_whole(self, parameter: nn.Parameter, layers: set[int]) -> bool:
        """Return whether a gradient stays whole until the backward pass ends."""
        return self.divides and (self.whole_gradients or id(parameter) not in layers)


@dataclass(frozen=True, slots=True)
class Extra:
    """Bytes that a device holds in addition, by label: through forward and backward passes, in backward passes, and
    when gradients have been computed."""

    always: Mapping[str, float] = field(default_factory=dict)
    backward: Mapping[str, float] = field(default_factory=dict)
    end: Mapping[str, float] = field(default_factory=dict)


def extra(division: Division, backbone: Backbone) -> Extra:
    """Return what a strategy adds to the memory of a step."""
    parameters = {id(p): p for p in backbone.parameters()}
    trained = {key: p for key, p in parameters.items() if p.requires_grad}
    if division.ddp:
        return Extra(always={EXCHANGE: sum(p.nbytes for p in trained.values())})
    if not division.divides:
        return Extra()
    layers = [{id(p) for p in layer.parameters()} for layer in repeated_layers(backbone.policy)]
    outside_keys = set(parameters) - set().union(*layers)

    def size(keys: set[int], *, gradients: bool = False) -> float:
        # Gradients are added up in float32 where weights are computed in less.
        chosen = [parameters[key] for key in keys if not gradients or key in trained]
        wide = 4 if division.compute_dtype is not None else 0
        return float(sum(p.numel() * (max(wide, p.itemsize) if gradients else p.itemsize) for p in chosen))

    sizes = sorted(size(layer) for layer in layers)
    # A layer computes while the next one is gathered. The weights outside of layers stay for the whole step.
    gathered = size(outside_keys) + sum(sizes[-2:] if division.reshard else sizes)
    exchanged = max((size(layer, gradients=True) for layer in layers), default=0.0)
    # Every layer's gradients are whole until the layer has computed the last one.
    waiting = max((sum(parameters[key].nbytes for key in layer if key in trained) for layer in layers), default=0)
    return Extra({GATHERED: gathered}, {EXCHANGE: exchanged + waiting}, {EXCHANGE: size(outside_keys, gradients=True)})
