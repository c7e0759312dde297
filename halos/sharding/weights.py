"""Builds a backbone for any strategy. If it is sharded, each rank holds only its own shards."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from halos.policy.adapters import adapter_layers, base_state, mark_base
from halos.policy.backbone import Backbone
from halos.policy.checks import weight_files
from halos.policy.loading import LoadOptions, ModelSpec
from halos.policy.pretrained import load_backbone
from halos.processes.collectives import rank_and_world
from halos.sharding.sharding import Sharding, full_state, load_full_state, sharded_modules

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CONVERSIONS = "_weight_conversions"
"""transformers' attribute of a model that was loaded from files."""


def make_backbone(
    spec: ModelSpec, sharding: Sharding | None, options: LoadOptions, *, reference: bool = False
) -> Backbone:
    """Load the policy, and its live reference if the spec says so, whole or sharded.

    Args:
        spec, options, reference: see :func:`load_backbone`.
        sharding: how to shard the models. All ranks must then call this function together. None: whole models.
    """
    if sharding is None:
        return load_backbone(spec, options, reference=reference)

    def shard(backbone: Backbone) -> None:
        # A copy without weights: sharding changes the modules in place, and export needs them as they were.
        backbone.skeleton = (copy.deepcopy(backbone.policy),)
        sharding.shard(backbone)
        load_weights(backbone.policy, spec, options)
        if backbone.reference is not None:
            # Both models are sharded alike, so that each rank copies its own shards.
            for target, source in zip(_tensors(backbone.reference), _tensors(backbone.policy), strict=True):
                target.data.copy_(source.data)
        if adapter_layers(backbone.policy):
            mark_base(backbone)  # the fingerprint of the base needs its weights

    return load_backbone(spec, options, reference=reference, shard=shard)


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    return chain(model.parameters(), model.buffers())


def gathered_policy(backbone: Backbone) -> PreTrainedModel | None:
    """Return the policy with all its weights, for export.

    A sharded policy is gathered into the CPU memory of rank 0, and the other ranks get None. All ranks must call this
    function together.
    """
    if not backbone.sharded:
        return backbone.policy
    for module in sharded_modules(backbone):
        module.reshard()
    state = full_state(backbone.policy)
    if rank_and_world()[0]:
        return None
    (policy,) = backbone.skeleton
    # Assigned, as parameters on the meta device have no memory to copy to. That unties tied weights.
    policy.load_state_dict(state, assign=True)
    policy.tie_weights()
    _copy_conversions(backbone.policy, policy)
    return policy


def load_weights(model: PreTrainedModel, spec: ModelSpec, options: LoadOptions) -> None:
    """Fill in the weights of a sharded model that was built without any. All ranks must call this function together.

    If a local directory has safetensors with the model's own names and shapes, each rank reads its own shards from
    them. In all other cases (a hub id, GGUF, random weights, a grown vocabulary) rank 0 loads the model into its CPU
    memory and broadcasts the weights.
    """
    files = None if spec.random_weights or options.new_tokens else matching_files(model, spec.local)
    if files is not None:
        _read_shards(model, files)
        return
    state = {}
    if rank_and_world()[0] == 0:
        loaded = spec.load(replace(options, quiet=True))
        state = loaded.state_dict()
        _copy_conversions(loaded, model)
    load_full_state(model, state)


def _copy_conversions(source: PreTrainedModel, target: PreTrainedModel) -> None:
    # How transformers renamed and merged the files' weights when it loaded them; save_pretrained reverts that.
    setattr(target, CONVERSIONS, getattr(source, CONVERSIONS, None))


def matching_files(model: PreTrainedModel, folder: Path | None) -> dict[str, Path] | None:
    """Map each entry of the model's state dict, adapters aside, to the safetensors file that contains it.

    Returns:
        The file of each name. Of several names for tied weights, one in the files is enough. None if the files' names
        and shapes are not exactly the model's.
    """
    if folder is None or not folder.is_dir() or _converted_while_loading(model):
        return None
    files: dict[str, Path] = {}
    shapes: dict[str, list[int]] = {}
    for path in weight_files(folder):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  (it is not a dictionary)
                files[name], shapes[name] = path, file.get_slice(name).get_shape()
    state = base_state(model)
    if any(name not in state or list(state[name].shape) != shape for name, shape in shapes.items()):
        return None
    # Compared by identity: tied weights are one tensor under two names, and the files contain only one of the names.
    stored = {id(state[name]) for name in files}
    return files if all(id(tensor) in stored for tensor in state.values()) else None


def _converted_while_loading(model: PreTrainedModel) -> bool:
    # transformers merges or renames the weights of some architectures (mostly experts) while it loads them.
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
    except ImportError:
        return True
    return bool(get_model_conversion_mapping(model, add_legacy=False))


@torch.no_grad()
def _read_shards(model: PreTrainedModel, files: Mapping[str, Path]) -> None:
    # Not torch.distributed.checkpoint's HuggingFaceStorageReader: it ignores the index and reads all safetensors files
    # of the folder. A forgotten file with the same names would silently replace the model's weights.
    state = base_state(model)
    for path in sorted(set(files.values())):
        with safe_open(path, framework="pt") as file:
            for name in (name for name, source in files.items() if source == path):
                target = state[name]
                if not isinstance(target, DTensor):
                    target.copy_(file.get_tensor(name))
                    continue
                mesh, placements = target.device_mesh, target.placements
                shape, offset = compute_local_shape_and_global_offset(target.shape, mesh, placements)
                # A rank's shard is empty where a dimension is shorter than the mesh; safetensors refuses empty slices.
                if 0 not in shape:
                    shard = tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))
                    target.to_local().copy_(file.get_slice(name)[shard])
