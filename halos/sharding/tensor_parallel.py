"""Tensor parallelism (arXiv 1909.08053): decoder layers' products divided over ranks, by transformers' own plan.

A model's plan names its linear layers and how each is divided.

- ``colwise``: each rank computes some of the outputs (some of the attention heads, a part of the MLP's width).
- ``rowwise``: each rank multiplies its part of the inputs, and the ranks add up their results.

Embeddings and LM head are not divided, whatever the plan says about them: FSDP2 gathers them for each forward.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module

from halos.checks import check_whole

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class _PerHead(ParallelStyle):
    """A norm over each attention head. Each rank has all its weights, and gradients from its own heads only.

    ``distribute_module`` replicates the weights as DTensors, whose gradients are then summed over the ranks.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        # PyTorch's annotations have both functions return None.
        return distribute_module(module, device_mesh, None, self._as_shards, self._as_local)  # type: ignore[arg-type]

    @staticmethod
    def _as_shards(_: nn.Module, inputs: tuple[Tensor, ...], mesh: DeviceMesh) -> tuple[DTensor, ...]:
        # The heads are in another dimension than 0. This makes no difference to a norm over the last one.
        return tuple(DTensor.from_local(states, mesh, [Shard(0)], run_check=False) for states in inputs)

    @staticmethod
    def _as_local(_: nn.Module, output: DTensor, mesh: DeviceMesh) -> Tensor:
        return output.to_local()


STYLES: Mapping[str, Callable[[], ParallelStyle]] = {
    "colwise": ColwiseParallel,
    "rowwise": RowwiseParallel,
    "colwise_gather_output": partial(ColwiseParallel, output_layouts=Replicate()),
    "rowwise_split_input": partial(RowwiseParallel, input_layouts=Replicate()),
    "replicated_with_grad_allreduce": _PerHead,
}
"""The styles of transformers' plans that this strategy supports."""


def plan_of(model: nn.Module) -> dict[str, str]:
    """Return the style of each module or parameter in the decoder layers that the model's plan covers, by name."""
    plan: Mapping[str, str] = getattr(model, "_tp_plan", None) or {}
    names = [name for name, _ in (*model.named_modules(), *model.named_parameters())]
    # The plan writes a layer's number as a star: model.layers.*.mlp.down_proj. Other names are outside the layers.
    patterns = {name: re.sub(r"\.\d+(?=\.|$)", ".*", name) for name in names}
    return {name: plan[pattern] for name, pattern in patterns.items() if "*" in pattern and pattern in plan}


def check_plan(model: PreTrainedModel, ranks: int) -> None:
    """Raise ``ValueError`` unless the model's plan has supported styles only and divides over this number of ranks."""
    key = "strategy.tensor_parallel_size"
    check_whole(key, ranks, 1)
    kind, plan = type(model).__name__, plan_of(model)
    if not plan:
        expected = "a model for which transformers has a tensor-parallel plan"
        raise ValueError(f"strategy=fsdp_tp: expected {expected}, found {kind}; use strategy=fsdp")
    modules = dict(model.named_modules())
    for name, style in plan.items():
        linear = isinstance(modules.get(name), nn.Linear)
        if style not in STYLES or not (linear or STYLES[style] is _PerHead):
            expected = f"linear layers of the styles {', '.join(STYLES)} in the plan of {kind}"
            raise ValueError(f"strategy=fsdp_tp: expected {expected}; found {style} for {name}; use strategy=fsdp")
    if "colwise" in plan.values():
        # A rank has whole heads: a head's scores need all of its width.
        config = model.config.get_text_config()
        for name in ("num_attention_heads", "num_key_value_heads"):
            check_divisor(key, ranks, getattr(config, name, None) or 0, f"{name} of {kind}")
    for name, style in plan.items():
        width = "out_features" if style.startswith("colwise") else "in_features"
        check_divisor(key, ranks, getattr(modules[name], width, 0), f"{width} of {name} in {kind}")


def check_divisor(key: str, size: int, count: int, what: str) -> None:
    """Raise ``ValueError`` that names the key unless ``count`` can be divided into groups of this size."""
    if count % size:
        raise ValueError(f"{key}: expected a divisor of the {count} {what}, found {size}")


def divide_products(model: nn.Module, mesh: DeviceMesh) -> None:
    """Divide the model's layers over the mesh in place. Parameters may be on the meta device.

    Args:
        model: the model.
        mesh: a mesh of one dimension, the ranks of a tensor-parallel group.
    """
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    parallelize_module(model, mesh, {name: STYLES[style]() for name, style in plan_of(model).items()})
    for name, parameter in model.named_parameters():
        # Some styles make new parameters, which all require gradients.
        parameter.requires_grad_(name not in frozen)
