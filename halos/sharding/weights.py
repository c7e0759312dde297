"""Weights of a sharded model: read so that each rank holds its own part only."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from halos.policy.adapters import adapter_layers, base_state, mark_base
from halos.policy.backbone import Backbone
from halos.policy.loading import ModelSpec
from halos.policy.pretrained import load_backbone, use_fast_layers
from halos.processes.collectives import rank_and_world
from halos.sharding.sharding import Sharding, full_state, load_full_state, sharded_modules


def make_backbone(
    spec: ModelSpec,
    sharding: Sharding | None,
    *,
    dtype: torch.dtype,
    new_tokens: Sequence[int],
    vocabulary: int,
    with_reference: bool,
    adapter_reference: bool = False,
) -> Backbone:
    """The policy, and its live reference if asked for, whole or (all ranks together) divided before it has weights."""
    weights: dict[str, Any] = {"dtype": dtype, "new_tokens": new_tokens, "vocabulary": vocabulary}
    references: dict[str, Any] = {"with_reference": with_reference, "adapter_reference": adapter_reference}
    if sharding is None:
        return load_backbone(spec, **weights, **references)
    options = {"head_chunk": spec.head_chunk, "statistics": spec.statistics, **references}
    backbone = _divided(spec, sharding, weights, options)
    use_fast_layers(backbone, spec)
    return backbone


def _divided(spec: ModelSpec, sharding: Sharding, weights: Mapping[str, Any], options: Mapping[str, Any]) -> Backbone:
    with parameters_on_meta():
        policy = spec.skeleton(**weights)
        skeleton = copy.deepcopy(policy)
        made = Backbone(policy, **options)
    made.skeleton = (skeleton,)
    sharding.shard(made)
    load_weights(made.policy, spec, **weights)
    if made.reference is not None:
        for theirs, ours in zip(_tensors(made.reference), _tensors(made.policy), strict=True):
            theirs.data.copy_(ours.data)
    if adapter_layers(made.policy):
        mark_base(made)
    return made


def whole_policy(backbone: Backbone) -> Any:
    """The policy with all its weights. Of a sharded one this is a copy in the CPU's memory on rank 0, and None on the
    others; all ranks have to ask for it."""
    if not backbone.sharded:
        return backbone.policy
    for part in sharded_modules(backbone):
        part.reshard()
    state = full_state(backbone.policy)
    if rank_and_world()[0]:
        return None
    (policy,) = backbone.skeleton
    policy.load_state_dict(state, assign=True)
    policy.tie_weights()
    return policy


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from model.buffers()


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Within, parameters that modules register get no memory. Buffers do: those outside the state dict (rotary
    frequencies) are computed by constructors alone, and nothing would fill them in later."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and parameter.device.type != "meta":
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def load_weights(
    model: Any, spec: ModelSpec, *, dtype: torch.dtype, new_tokens: Sequence[int] = (), vocabulary: int = 0
) -> None:
    """Fill in the weights of a sharded model that was made without any; all ranks have to call it.

    From a local directory whose safetensors have the model's own names and shapes each rank reads its part of each
    tensor. Anything else (a hub id, GGUF, random weights, a vocabulary that grows) is loaded by rank 0 into the CPU's
    memory and handed out.
    """
    files = None if spec.random_weights or new_tokens else matching_files(model, spec.folder)
    if files is not None:
        _read_parts(model, files)
        return
    first = rank_and_world()[0] == 0
    load_full_state(
        model, spec.load(dtype=dtype, new_tokens=new_tokens, vocabulary=vocabulary).state_dict() if first else {}
    )


def matching_files(model: Any, folder: Path | None) -> dict[str, Path] | None:
    """For each entry of the model's state dict, adapters aside, the safetensors file that holds it, or None unless all
    are there, by the same names and shapes, and no others. Of tied weights one name is enough."""
    if folder is None or _converted_while_loading(model):
        return None
    found: dict[str, Path] = {}
    shapes: dict[str, list[int]] = {}
    for path in _safetensors(folder):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  (it is no dictionary)
                found[name], shapes[name] = path, file.get_slice(name).get_shape()
    state = base_state(model)
    if any(name not in state or list(state[name].shape) != shape for name, shape in shapes.items()):
        return None
    there = {id(state[name]) for name in found}
    return found if all(id(tensor) in there for tensor in state.values()) else None


def _converted_while_loading(model: Any) -> bool:
    # transformers merges or renames some architectures' weights (experts, mostly); that is left to it.
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
    except ImportError:
        return True
    return bool(get_model_conversion_mapping(model, add_legacy=False))


def _safetensors(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        return [folder / name for name in sorted(names)]
    return [folder / "model.safetensors"]


@torch.no_grad()
def _read_parts(model: Any, files: dict[str, Path]) -> None:
    state = base_state(model)
    for path in sorted(set(files.values())):
        with safe_open(path, framework="pt") as file:
            for name in (name for name, place in files.items() if place == path):
                target = state[name]
                if not isinstance(target, DTensor):
                    target.copy_(file.get_tensor(name))
                    continue
                shape, offset = compute_local_shape_and_global_offset(
                    target.shape, target.device_mesh, target.placements
                )
                if 0 not in shape:
                    part = tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))
                    target.to_local().copy_(file.get_slice(name)[part])
