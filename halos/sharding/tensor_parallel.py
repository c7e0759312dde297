"""Tensor parallelism (arXiv 1909.08053): the products of decoder layers divided over ranks, by transformers' own plan.

A model's plan names its linear layers and how each is divided. ``colwise``: each rank computes some of the outputs
(whole attention heads, a part of the MLP's width); ``rowwise``: each rank multiplies what it has, and the ranks add up
their results. What the plan says of embeddings and LM head is left: they stay whole within a forward.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module

from halos.checks import check_whole


class _PerHead(ParallelStyle):
    """A norm of each head by itself: the weights are whole, and each rank's gradient comes from its own heads."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        return distribute_module(module, device_mesh, None, self._divided, self._own)

    @staticmethod
    def _divided(_: nn.Module, inputs: Any, mesh: DeviceMesh) -> Any:
        # Which dimension the heads are in makes no difference to a norm over the last one.
        return tuple(DTensor.from_local(states, mesh, [Shard(0)], run_check=False) for states in inputs)

    @staticmethod
    def _own(_: nn.Module, output: Any, mesh: DeviceMesh) -> Any:
        return output.to_local()


STYLES: Mapping[str, Callable[[], ParallelStyle]] = {
    "colwise": ColwiseParallel,
    "rowwise": RowwiseParallel,
    "colwise_gather_output": partial(ColwiseParallel, output_layouts=Replicate()),
    "rowwise_split_input": partial(RowwiseParallel, input_layouts=Replicate()),
    "replicated_with_grad_allreduce": _PerHead,
}
"""Styles of transformers' plans that are understood here."""


def check_size(name: str, value: Any) -> int:
    """The number. Raises ``ValueError`` naming the key of the strategy unless it is a whole one from 1 on."""
    check_whole(f"strategy.{name}", value, 1)
    return value


def plan_of(model: nn.Module) -> dict[str, str]:
    """{name of a module or parameter in the decoder layers: its style}, for all that the model's plan speaks of."""
    plan: Mapping[str, str] = getattr(model, "_tp_plan", None) or {}
    names = [name for name, _ in (*model.named_modules(), *model.named_parameters())]
    patterns = {name: re.sub(r"\.\d+(?=\.|$)", ".*", name) for name in names}
    return {name: plan[pattern] for name, pattern in patterns.items() if "*" in pattern and pattern in plan}


def check_plan(model: Any, ranks: int) -> None:
    """Raise ``ValueError`` unless the model has a plan that is understood, and can be divided over so many ranks."""
    check_size("tensor_parallel_size", ranks)
    kind, plan = type(model).__name__, plan_of(model)
    if not plan:
        raise ValueError(
            f"strategy=fsdp_tp: expected a model with a tensor-parallel plan, found {kind}, for which transformers has "
            "none; use strategy=fsdp"
        )
    modules = dict(model.named_modules())
    for name, style in plan.items():
        linear = isinstance(modules.get(name), nn.Linear)
        if style not in STYLES or not (linear or STYLES[style] is _PerHead):
            raise ValueError(
                f"strategy=fsdp_tp: expected the plan of {kind} to have linear layers of the styles "
                f"{', '.join(STYLES)}; found {style} for {name}; use strategy=fsdp"
            )
    if "colwise" in plan.values():
        _check_heads(kind, model.config.get_text_config(), ranks)
    for name, style in plan.items():
        width = "out_features" if style.startswith("colwise") else "in_features"
        if getattr(modules[name], width, 0) % ranks:
            raise ValueError(
                f"strategy.tensor_parallel_size: expected a divisor of the {getattr(modules[name], width)} {width} of "
                f"{name} in {kind}, found {ranks}"
            )


def _check_heads(kind: str, config: Any, ranks: int) -> None:
    for name in ("num_attention_heads", "num_key_value_heads"):
        heads = getattr(config, name, None)
        if heads and heads % ranks:
            raise ValueError(
                f"strategy.tensor_parallel_size: expected a divisor of the {heads} {name} of {kind}, found {ranks}"
            )


def divide_products(model: nn.Module, mesh: DeviceMesh) -> None:
    """Divide the model's layers over the mesh (of one dimension) in place; parameters may be on the meta device."""
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    parallelize_module(model, mesh, {name: STYLES[style]() for name, style in plan_of(model).items()})
    for name, parameter in model.named_parameters():  # some styles forget it
        parameter.requires_grad_(name not in frozen)
