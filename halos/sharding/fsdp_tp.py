"""``strategy=fsdp_tp``: FSDP2 over groups of devices, each of which computes decoder layers together."""

from __future__ import annotations

import logging
from dataclasses import replace

from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from halos.checks import check_whole
from halos.config.combinations import check_combinations
from halos.optim import AdamW, Optim, RMSprop
from halos.policy.loading import LoadOptions, ModelSpec
from halos.sharding.fsdp import FSDP
from halos.sharding.sharding import Sharding
from halos.sharding.tensor_parallel import check_divisor, check_plan

DATA, TENSOR = "data_parallel", "tensor_parallel"
"""Lightning's names for the dimensions of the device mesh."""


def check_model(spec: ModelSpec, optim: Optim, ranks: int) -> None:
    """Check that a model can be trained by this strategy. Reads the model's config only.

    Args:
        spec: the model.
        optim: the optimizer.
        ranks: devices in a tensor-parallel group.

    Raises:
        ValueError: an option of the model or the optimizer is not supported, or the model cannot be divided.
    """
    check_combinations(spec.flat() | {"strategy.name": "fsdp_tp"})
    if type(optim) not in (AdamW, RMSprop):
        raise ValueError(f"optim: expected AdamW or RMSprop with strategy=fsdp_tp, found {type(optim).__name__}")
    check_plan(spec.skeleton(LoadOptions(quiet=True)), ranks)


class FSDPTP(FSDP):
    """FSDP2 combined with tensor parallelism, on a mesh of two dimensions.

    Neighbouring ranks form a tensor-parallel group. They read the same data, and each computes a part of every product
    of the decoder layers. Each part is sharded by FSDP2 over the groups. Weights outside the decoder layers are sharded
    over all devices.

    Args:
        tensor_parallel_size: devices in a group.
        data_parallel_size: number of groups. None: devices / tensor_parallel_size.
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
        check_whole("strategy.tensor_parallel_size", tensor_parallel_size, 1)
        check_whole("strategy.data_parallel_size", data_parallel_size, 1, null=True)
        self.tensor_parallel_size, self.data_parallel_size = tensor_parallel_size, data_parallel_size
        self._all: DeviceMesh | None = None

    def check(self, devices: int) -> None:
        """Raise ``ValueError`` unless the number of devices fits both sizes."""
        size = self.tensor_parallel_size
        check_divisor("strategy.tensor_parallel_size", size, devices, "devices (trainer.devices × trainer.num_nodes)")
        groups = devices // size
        if self.data_parallel_size not in (None, groups):
            expected = f"{groups} ({devices} devices in groups of {size}) or null"
            raise ValueError(f"strategy.data_parallel_size: expected {expected}, found {self.data_parallel_size}")

    @property
    def sharding(self) -> Sharding:
        meshes = self.device_mesh
        return replace(super().sharding, mesh=meshes[DATA], tensor_mesh=meshes[TENSOR], root_mesh=self._all)

    @property
    def data_group(self) -> ProcessGroup:
        """The process group of ranks that read different data: one rank of each tensor-parallel group."""
        return self.device_mesh[DATA].get_group()

    def _mesh(self) -> DeviceMesh:
        # PyTorch warns that tensors which are sharded twice are gathered in two steps. Only checkpoints and exports
        # gather, where the extra step does not matter.
        logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
        kind, groups = self.root_device.type, self.world_size // self.tensor_parallel_size
        # A second mesh over the same ranks: FSDP2 shards the weights outside the decoder layers over all of them.
        self._all = init_device_mesh(kind, (self.world_size,), mesh_dim_names=("all",))
        return init_device_mesh(kind, (groups, self.tensor_parallel_size), mesh_dim_names=(DATA, TENSOR))

    @property
    def distributed_sampler_kwargs(self) -> dict[str, int]:
        group_size = self.tensor_parallel_size
        return {"num_replicas": self.world_size // group_size, "rank": self.global_rank // group_size}
