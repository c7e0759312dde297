"""``strategy=fsdp``: FSDP2 through Lightning's ModelParallelStrategy, with checkpoints that any strategy reads."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.optim import Optimizer

from halos.checks import check_whole
from halos.sharding.reading import State, load_entries, read_meta
from halos.sharding.sharding import Sharding, full_state, load_full_state, materialise
from halos.sharding.tensor_parallel import check_divisor


class ShardedMixed(Precision):
    """bf16-mixed for float32 shards, without autocast, because FSDP2 itself casts the weights for each forward."""

    precision = "bf16-mixed"


class FSDP(ModelParallelStrategy):
    """Fully sharded data parallelism. The objective shards its models with :attr:`sharding`.

    Args:
        replicas: copies of the sharded model (HSDP). Each copy is sharded over devices / replicas devices.
        reshard_after_forward, cpu_offload, defer_gradient_sync: see :class:`halos.sharding.sharding.Sharding`.
        sharded_checkpoints: write checkpoints as folders, to which each rank writes its own shards, instead of one file
            that rank 0 gathers. Only this strategy reads such folders; ``scripts/consolidate.py`` converts them to one
            file.
    """

    def __init__(
        self,
        *,
        replicas: int = 1,
        reshard_after_forward: bool = True,
        cpu_offload: bool = False,
        defer_gradient_sync: bool = False,
        sharded_checkpoints: bool = False,
    ) -> None:
        check_whole("strategy.trainer.replicas", replicas, 1)
        super().__init__(save_distributed_checkpoint=sharded_checkpoints)
        self.replicas, self.cpu_offload = replicas, cpu_offload
        options = partial(Sharding, reshard_after_forward=reshard_after_forward, cpu_offload=cpu_offload)
        self._sharding = partial(options, defer_gradient_sync=defer_gradient_sync)

    def check(self, devices: int) -> None:
        """Raise ``ValueError`` unless the number of devices can be divided into replicas."""
        check_divisor("strategy.trainer.replicas", self.replicas, devices, "devices")

    @property
    def sharding(self) -> Sharding:
        """How to shard models. Available once the process group is set up."""
        return self._sharding(mesh=self.device_mesh, device=self.root_device, compute_dtype=self.compute_dtype)

    @property
    def compute_dtype(self) -> torch.dtype | None:
        """The dtype that weights are cast to for a forward. None: their own."""
        return torch.bfloat16 if isinstance(self.precision_plugin, ShardedMixed) else None

    def setup_environment(self) -> None:
        self._setup_distributed()
        if self._device_mesh is None:
            self._device_mesh = self._mesh()

    def _mesh(self) -> DeviceMesh:
        shards = self.world_size // self.replicas
        if self.replicas == 1:
            return init_device_mesh(self.root_device.type, (shards,), mesh_dim_names=("shard",))
        names = ("replicate", "shard")
        return init_device_mesh(self.root_device.type, (self.replicas, shards), mesh_dim_names=names)

    def _get_process_group_backend(self) -> str:
        # The norm of offloaded gradients is reduced on the CPU, the gradients themselves on the GPU.
        both = self.cpu_offload and self.root_device.type == "cuda"
        return "cpu:gloo,cuda:nccl" if both else super()._get_process_group_backend()

    @property
    def distributed_sampler_kwargs(self) -> dict[str, int]:
        return {"num_replicas": self.world_size, "rank": self.global_rank}

    def model_to_device(self) -> None:
        if self.cpu_offload and self.model is not None:
            # Lightning would move the shards to the GPU too. Buffers and metrics have to be there.
            materialise(self.model, shards=torch.device("cpu"), buffers=self.root_device)
        else:
            super().model_to_device()

    # Checkpoints. By default a checkpoint is one file in the format of all other strategies: names without prefixes,
    # and the optimizer state by positions of parameters. PyTorch's functions for sharded states use parameter names.

    def lightning_module_state_dict(self) -> State:
        if self._save_distributed_checkpoint:
            return super().lightning_module_state_dict()
        return full_state(self._module)

    def optimizer_state(self, optimizer: Optimizer) -> State:
        if self._save_distributed_checkpoint:
            return super().optimizer_state(optimizer)
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state = get_optimizer_state_dict(self._module, _plain(optimizer), options=options)
        return by_position(state) if self.global_rank == 0 else {}

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> State:
        path = Path(self.broadcast(str(checkpoint_path)))
        if path.is_dir():
            return self._load_sharded(path)
        # Memory-mapped: rank 0 reads the tensors as it broadcasts them, and the other ranks read none.
        checkpoint: State = torch.load(path, mmap=True, map_location="cpu", weights_only=True)  # noqa: TID251 (safe)
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        load_full_state(self._module, checkpoint["state_dict"])
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=False):
            named = by_name(state, self._module, optimizer) if self.global_rank == 0 else {}
            set_optimizer_state_dict(self._module, optimizer, named, options=options)
        return checkpoint

    def _load_sharded(self, folder: Path) -> State:
        # The same steps as Lightning's, whose reader would unpickle what is in the folder.
        state: State = {"state_dict": get_model_state_dict(self._module)}
        load_entries(state, folder)
        self._module.load_state_dict(state["state_dict"])
        for number, optimizer in enumerate(self.optimizers):
            name, plain = f"optimizer_{number}", _plain(optimizer)
            state = {name: get_optimizer_state_dict(self._module, plain)}
            load_entries(state, folder)
            options = StateDictOptions(cpu_offload=True)
            set_optimizer_state_dict(self._module, plain, state[name], options=options)
        return read_meta(folder)

    @property
    def _module(self) -> nn.Module:
        if self.model is None:
            raise ValueError("strategy: expected one that a Trainer has set up, found one without a model")
        return self.model


def _plain(optimizer: Optimizer | LightningOptimizer) -> Optimizer:
    return optimizer._optimizer if isinstance(optimizer, LightningOptimizer) else optimizer


def by_position(state: State) -> State:
    """Convert an optimizer's state from names of parameters to positions, the format of ``Optimizer.state_dict``."""
    names = [name for group in state["param_groups"] for name in group["params"]]
    positions = {name: position for position, name in enumerate(names)}
    groups = [{**group, "params": [positions[name] for name in group["params"]]} for group in state["param_groups"]]
    return {"state": {positions[name]: values for name, values in state["state"].items()}, "param_groups": groups}


def by_name(state: State, module: nn.Module, optimizer: Optimizer) -> State:
    """Do the reverse of :func:`by_position` for this optimizer of the module's parameters."""
    name_of = {id(parameter): name for name, parameter in module.named_parameters()}
    names = [name_of[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]
    groups = [{**group, "params": [names[position] for position in group["params"]]} for group in state["param_groups"]]
    return {"state": {names[position]: values for position, values in state["state"].items()}, "param_groups": groups}
