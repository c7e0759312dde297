"""``strategy=fsdp_tp``: FSDP2 over groups of devices that compute each decoder layer together."""

from __future__ import annotations

import logging
from typing import Any

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from halos.optim import AdamW, Optim, RMSprop
from halos.policy.loading import ModelSpec
from halos.sharding.fsdp import FSDP
from halos.sharding.sharding import Sharding
from halos.sharding.tensor_parallel import check_plan, check_size

DATA, TENSOR = "data_parallel", "tensor_parallel"
"""Lightning's names for the dimensions of the mesh."""


def check_model(spec: ModelSpec, optim: Optim, ranks: int) -> None:
    """Raise ``ValueError`` for a model, or a way to train it, that does not go with groups of so many ranks; reads
    the model's config only."""
    for key, found, expected in (
        ("lora.enabled", spec.lora.enabled, False),
        ("compile", spec.compile, False),
        ("liger", spec.liger, False),
        ("packed_attention", spec.packed_attention, "pieces"),
        ("dropout", spec.dropout, 0),  # heads on different ranks would have to draw apart, all else alike
    ):
        if found != expected:
            raise ValueError(f"model.{key}: expected {expected} with strategy=fsdp_tp, found {found}")
    if type(optim) not in (AdamW, RMSprop):
        raise ValueError(f"optim: expected AdamW or RMSprop with strategy=fsdp_tp, found {type(optim).__name__}")
    check_plan(spec.skeleton(), ranks)


class FSDPTP(FSDP):
    """Devices in a mesh of two dimensions: those of a tensor-parallel group read the same data and divide each layer's
    products; over the groups the parts are divided as by FSDP. What lies outside the decoder layers is divided over all
    devices. Ranks that follow each other form a group.

    Args:
        tensor_parallel_size: devices in a group.
        data_parallel_size: groups; None: as many as there are devices for.
        reshard_after_forward, sharded_checkpoints: see :class:`halos.sharding.fsdp.FSDP`.
    """

    def __init__(
        self,
        *,
        tensor_parallel_size: int,
        data_parallel_size: int | None = None,
        reshard_after_forward: bool = True,
        sharded_checkpoints: bool = False,
    ) -> None:
        super().__init__(reshard_after_forward=reshard_after_forward, sharded_checkpoints=sharded_checkpoints)
        self.tensor_parallel_size = check_size("tensor_parallel_size", tensor_parallel_size)
        self.data_parallel_size = data_parallel_size
        if data_parallel_size is not None:
            check_size("data_parallel_size", data_parallel_size)
        self._all: DeviceMesh | None = None

    def check(self, devices: int) -> None:
        """Raise ``ValueError`` unless so many devices make groups of this size, and as many as asked for."""
        groups, left = divmod(devices, self.tensor_parallel_size)
        if left:
            raise ValueError(
                f"strategy.tensor_parallel_size: expected a divisor of the {devices} devices (trainer.devices × "
                f"trainer.num_nodes), found {self.tensor_parallel_size}"
            )
        if self.data_parallel_size not in (None, groups):
            raise ValueError(
                f"strategy.data_parallel_size: expected {groups} ({devices} devices in groups of "
                f"{self.tensor_parallel_size}) or null, found {self.data_parallel_size}"
            )

    @property
    def sharding(self) -> Sharding:
        return Sharding(
            mesh=self.device_mesh[DATA],
            root_mesh=self._all,
            tensor_mesh=self.device_mesh[TENSOR],
            device=self.root_device,
            compute_dtype=self.compute_dtype,
            reshard_after_forward=self.reshard_after_forward,
        )

    @property
    def data_group(self) -> Any:
        """The process group of the ranks that read different data, with one of each tensor-parallel group."""
        return self.device_mesh[DATA].get_group()

    def _mesh(self) -> DeviceMesh:
        # PyTorch warns that whole tensors are put together in two steps, which checkpoints and exports alone do.
        logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
        kind, groups = self.root_device.type, self.world_size // self.tensor_parallel_size
        self._all = init_device_mesh(kind, (self.world_size,), mesh_dim_names=("all",))
        return init_device_mesh(kind, (groups, self.tensor_parallel_size), mesh_dim_names=(DATA, TENSOR))

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        share = self.tensor_parallel_size
        return {"num_replicas": self.world_size // share, "rank": self.global_rank // share}
