"""FSDP2: parameters, gradients and optimizer state divided over the ranks, layer by layer.

1. Each decoder layer is an FSDP2 module: its weights are gathered before its forward and freed after it.
2. The :class:`Backbone` is the root module. Embeddings, LM head and everything else outside the decoder layers are
   gathered for the whole of its forward, within which the head is read in chunks.
3. The live reference is a root of its own, with a backbone of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from halos.policy.backbone import Backbone
from halos.policy.kernels.layers import repeated_layers
from halos.processes.collectives import rank_and_world
from halos.sharding.tensor_parallel import divide_products


@dataclass(frozen=True, slots=True, kw_only=True)
class Sharding:
    """How to shard models over a mesh of devices.

    Args:
        mesh: one dimension (shards), or two (copies of the model, shards of each copy).
        device: the device that computes.
        compute_dtype: dtype of gathered weights and of the computation. The optimizer's shards keep their own dtype,
            and gradients are reduced in float32. None: everything uses the dtype of the shards.
        reshard_after_forward: free a layer's gathered weights between its forward and its backward.
        cpu_offload: store shards, gradients and optimizer state in CPU memory.
        root_mesh: mesh for the weights outside the decoder layers. None: ``mesh``.
        tensor_mesh: mesh for tensor parallelism, which divides the products of decoder layers before FSDP2 shards the
            layers. None: no tensor parallelism.
        defer_gradient_sync: accumulate unsharded gradients on each rank and reduce them once per optimizer step. This
            saves communication and costs the memory of a whole model's gradients.
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
        """Shard the policy, and its live reference if there is one, in place. Parameters may be on the meta device."""
        # Gradients are summed in float32: in bfloat16 the sum over many ranks would lose what each contributes.
        reduce_dtype = None if self.compute_dtype is None else torch.float32
        policy = MixedPrecisionPolicy(param_dtype=self.compute_dtype, reduce_dtype=reduce_dtype)
        for member in backbone.with_reference_backbone():
            # Tensor parallelism comes first: FSDP2 can shard its DTensors, but it cannot divide those of FSDP2.
            if self.tensor_mesh is not None:
                divide_products(member.policy, self.tensor_mesh)
            # Layers before the root: fully_shard leaves out the parameters of modules that are sharded already.
            for layer in repeated_layers(member.policy):
                self._shard(layer, self.mesh, policy, self.reshard_after_forward)
            # None: FSDP2 keeps a root's weights after its forward, for the backward pass that follows at once. The
            # reference has no backward pass, so its root frees them.
            self._shard(member, self._root_mesh, policy, None if member is backbone else True)
            member.sharding = self
        materialise(backbone, shards=torch.device("cpu") if self.cpu_offload else self.device, buffers=self.device)

    def shard_beside(self, module: nn.Module) -> None:
        """Shard the modules of an objective other than the backbone, such as a value head, in their own precision.

        Raises:
            ValueError: the objective itself has parameters. FSDP2 gathers weights in a module's forward, and an
                objective's forward is never called.
        """
        for child in module.children():
            if isinstance(child, Backbone) or not any(True for _ in child.parameters()):
                continue
            if type(child).forward is _NO_FORWARD or hasattr(child, "training_step"):
                self.shard_beside(child)
            else:
                self._shard(child.to(self.device), self._root_mesh, MixedPrecisionPolicy(), True)
        if names := [name for name, _ in module.named_parameters(recurse=False)]:
            expected = f"the parameters of {type(module).__name__} inside modules that are called"
            raise ValueError(f"strategy=fsdp: expected {expected}, found {', '.join(names)}")

    @property
    def tensor_group(self) -> ProcessGroup | None:
        """The ranks of this rank's tensor-parallel group, which read the same data."""
        return None if self.tensor_mesh is None else self.tensor_mesh.get_group()

    def begin_micro_batch(self, module: nn.Module, *, last: bool) -> None:
        """Prepare for a backward pass. ``last``: it is the last one of an optimizer step."""
        if self.defer_gradient_sync:
            for sharded in sharded_modules(module):
                sharded.set_requires_gradient_sync(last, recurse=False)

    @property
    def _root_mesh(self) -> DeviceMesh:
        return self.mesh if self.root_mesh is None else self.root_mesh

    def _shard(self, module: nn.Module, mesh: DeviceMesh, policy: MixedPrecisionPolicy, reshard: bool | None) -> None:
        pinned = self.device.type != "cpu"
        offload = CPUOffloadPolicy(pin_memory=pinned) if self.cpu_offload else OffloadPolicy()
        fully_shard(module, mesh=mesh, reshard_after_forward=reshard, mp_policy=policy, offload_policy=offload)


# The forward that nn.ModuleList inherits, which raises NotImplementedError: such a module is never called.
_NO_FORWARD = nn.ModuleList.forward


def materialise(module: nn.Module, *, shards: torch.device, buffers: torch.device) -> None:
    """Give parameters on the meta device memory, without values, and move buffers, which have values.

    Args:
        module: a sharded module, changed in place.
        shards: device for the parameters' shards.
        buffers: device for the buffers.
    """

    def place(tensor: Tensor) -> Tensor:
        if tensor.device.type == "meta":
            return torch.empty_like(tensor, device=shards)
        return tensor if isinstance(tensor, nn.Parameter) else tensor.to(buffers)

    module._apply(place)


def full_state(module: nn.Module) -> dict[str, Any]:
    """Gather the module's state dict into the CPU memory of rank 0; it is empty on other ranks.

    All ranks must call this function together.
    """
    _reshard(module)
    return get_model_state_dict(module, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def _reshard(module: nn.Module) -> None:
    # After a forward without a backward the root still has gathered weights, which are not DTensors.
    for sharded in sharded_modules(module):
        sharded.reshard()


def load_full_state(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Distribute the state dict of :func:`full_state` from rank 0. All ranks must call this function together."""
    _reshard(module)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    with _buffers_beside_weights(module):
        set_model_state_dict(module, dict(state) if rank_and_world()[0] == 0 else {}, options=options)


@contextmanager
def _buffers_beside_weights(module: nn.Module) -> Iterator[None]:
    # PyTorch broadcasts a state dict on one device only. Weights of offloaded models are on the CPU and buffers are
    # not, so the buffers move to the weights' device for the broadcast, and back.
    device = next(module.parameters()).device
    moved = [
        (owner, name, buffer.device)
        for owner in module.modules()
        for name, buffer in owner._buffers.items()
        if buffer is not None and buffer.device != device
    ]
    for owner, name, _ in moved:
        owner._buffers[name] = owner._buffers[name].to(device)  # type: ignore[union-attr]
    try:
        yield
    finally:
        # The broadcast replaces the buffers, so the new ones move back instead of the saved ones being restored.
        for owner, name, origin in moved:
            owner._buffers[name] = owner._buffers[name].to(origin)  # type: ignore[union-attr]


@contextmanager
def unsharded_root(backbone: Backbone) -> Iterator[None]:
    """Gather the root's weights, so that the policy can be called without the backbone (to generate).

    All ranks must enter it together if the policy is sharded.
    """
    if isinstance(backbone, FSDPModule):
        backbone.unshard()
    try:
        yield
    finally:
        if isinstance(backbone, FSDPModule):
            backbone.reshard()


def sharded_modules(module: nn.Module) -> Iterator[FSDPModule]:
    """Iterate over the modules that FSDP2 shards by themselves: roots and decoder layers."""
    return (child for child in module.modules() if isinstance(child, FSDPModule))
