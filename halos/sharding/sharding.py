"""FSDP2: parameters, gradients and optimizer state divided over the ranks, layer by layer.

A :class:`Backbone` is the root: embeddings, LM head and whatever else lies outside the decoder layers are whole during
its forward, within which the head is read in chunks. Its live reference is a root of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from halos.policy.backbone import Backbone
from halos.policy.kernels.layers import repeated_layers
from halos.processes.collectives import rank_and_world
from halos.sharding.tensor_parallel import divide_products


@dataclass(frozen=True, slots=True, kw_only=True)
class Sharding:
    """How to divide models over a mesh.

    Args:
        mesh: of one dimension, or of two: (copies, shards of each).
        device: where the shards lie during computation.
        compute_dtype: of weights during a forward, and of what is computed with them; the shards that the optimizer
            sees keep their own, and gradients are added up in float32. None: all in the shards' own.
        reshard_after_forward: free a layer's whole weights between its forward and its backward.
        cpu_offload: keep the shards, their gradients and the optimizer state in the CPU's memory.
        root_mesh: of what lies outside the decoder layers, where that is another.
        tensor_mesh: over which the products of decoder layers are divided before the models are, if they are.
        defer_gradient_sync: while gradients are accumulated, add up whole ones on each rank and divide them once a
            step: less traffic, but the memory of a whole model's gradients.
    """

    mesh: DeviceMesh
    device: torch.device
    compute_dtype: torch.dtype | None = None
    reshard_after_forward: bool = True
    cpu_offload: bool = False
    root_mesh: DeviceMesh | None = None
    tensor_mesh: DeviceMesh | None = None
    defer_gradient_sync: bool = False

    def shard(self, backbone: Backbone) -> None:
        """Divide the policy, and the live reference if there is one, in place; parameters may be on the meta device.

        The reference's embeddings are freed after each forward, as no backward pass will need them.
        """
        policy = MixedPrecisionPolicy(param_dtype=self.compute_dtype, reduce_dtype=self._reduced_in())
        for made in backbone.with_reference_backbone():
            if self.tensor_mesh is not None:
                divide_products(made.policy, self.tensor_mesh)
            for layer in repeated_layers(made.policy):
                self._shard(layer, self.mesh, policy, self.reshard_after_forward)
            self._shard(made, self._root_mesh, policy, True if made is not backbone else None)
            made.sharding = self
        materialise(backbone, shards=torch.device("cpu") if self.cpu_offload else self.device, buffers=self.device)

    def shard_beside(self, module: nn.Module) -> None:
        """Divide the modules beside the backbone, such as a value head; they compute in their own precision.

        Raises ``ValueError`` for parameters that belong to an objective itself: its forward is never called.
        """
        for child in module.children():
            if isinstance(child, Backbone) or not any(True for _ in child.parameters()):
                continue
            if type(child).forward is _NO_FORWARD or hasattr(child, "training_step"):
                self.shard_beside(child)
            else:
                self._shard(child.to(self.device), self._root_mesh, MixedPrecisionPolicy(), True)
        if own := [name for name, _ in module.named_parameters(recurse=False)]:
            raise ValueError(
                f"strategy=fsdp: expected the parameters of {type(module).__name__} to be inside modules that are "
                f"called, found {', '.join(own)}"
            )

    def begin_micro_batch(self, module: nn.Module, *, last: bool) -> None:
        """Before each backward pass: ``last`` is that of an optimizer step."""
        if self.defer_gradient_sync:
            for part in sharded_modules(module):
                part.set_requires_gradient_sync(last, recurse=False)

    @property
    def _root_mesh(self) -> DeviceMesh:
        return self.mesh if self.root_mesh is None else self.root_mesh

    def _shard(self, module: nn.Module, mesh: DeviceMesh, policy: MixedPrecisionPolicy, reshard: bool | None) -> None:
        pinned = self.device.type != "cpu"
        offload = CPUOffloadPolicy(pin_memory=pinned) if self.cpu_offload else OffloadPolicy()
        fully_shard(module, mesh=mesh, reshard_after_forward=reshard, mp_policy=policy, offload_policy=offload)

    def _reduced_in(self) -> torch.dtype | None:
        return None if self.compute_dtype is None else torch.float32


_NO_FORWARD = nn.ModuleList.forward


def materialise(module: nn.Module, *, shards: torch.device, buffers: torch.device) -> None:
    """Give memory to divided parameters on the meta device, without values; buffers, which have theirs, are moved."""

    def place(tensor: Tensor) -> Tensor:
        if tensor.device.type == "meta":
            return torch.empty_like(tensor, device=shards)
        return tensor if isinstance(tensor, nn.Parameter) else tensor.to(buffers)

    module._apply(place)


def full_state(module: nn.Module) -> dict[str, Any]:
    """The module's state on the CPU, put together on rank 0 and empty elsewhere. All ranks have to ask for it."""
    for part in sharded_modules(module):
        part.reshard()  # a root keeps its weights whole after a forward without a backward
    return get_model_state_dict(module, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def load_full_state(module: nn.Module, state: Mapping[str, Any]) -> None:
    """Hand out a state that rank 0 has, by the names of :func:`full_state`; all ranks have to call it."""
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    with _buffers_beside_weights(module):
        set_model_state_dict(module, dict(state) if rank_and_world()[0] == 0 else {}, options=options)


@contextmanager
def _buffers_beside_weights(module: nn.Module) -> Iterator[None]:
    # PyTorch hands out a state on one device only; the weights of offloaded models are on the CPU, buffers are not.
    device = next(module.parameters()).device
    moved = [
        (part, name, buffer.device)
        for part in module.modules()
        for name, buffer in part._buffers.items()
        if buffer is not None and buffer.device != device
    ]
    for part, name, _ in moved:
        part._buffers[name] = part._buffers[name].to(device)  # type: ignore[union-attr]
    try:
        yield
    finally:
        for part, name, place in moved:
            part._buffers[name] = part._buffers[name].to(place)  # type: ignore[union-attr]


@contextmanager
def whole_root(backbone: Backbone) -> Iterator[None]:
    """Within, the policy can be called by itself (to generate), by all ranks together if it is sharded."""
    if isinstance(backbone, FSDPModule):
        backbone.unshard()
    try:
        yield
    finally:
        if isinstance(backbone, FSDPModule):
            backbone.reshard()


def sharded_modules(module: nn.Module) -> Iterator[FSDPModule]:
    """The modules that are divided by themselves."""
    return (part for part in module.modules() if isinstance(part, FSDPModule))
