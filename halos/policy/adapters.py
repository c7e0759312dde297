"""LoRA adapters inside a model: the reference, the LM head, identity, checkpoints and export.

peft replaces linear layers by layers of its own, which contain the original layer and named adapters. The adapter
``default`` is trained. If training continues an adapter, which is then part of the reference, a frozen copy of it is
the adapter ``reference``. This module recognises peft's layers by their attributes, so that it need not import peft.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from halos.policy.kernels.matmul import Linear
from halos.processes.collectives import full_tensor

if TYPE_CHECKING:
    from torch.nn.modules.module import _IncompatibleKeys
    from transformers import PreTrainedModel

AdapterLayer = Any
"""A layer of peft's. Its attributes have no useful types: torch annotates each as a tensor or a module."""
POLICY, REFERENCE = "default", "reference"
"""Names of the trained adapter and of the frozen one."""
BASE = "base_fingerprint"
"""Name of the buffer in checkpoints that identifies the base model of the adapters."""


def adapter_layers(model: nn.Module) -> dict[str, AdapterLayer]:
    """Return peft's layers by name, outer ones first.

    A module of experts has one layer for each adapted tensor, nested in each other. A layer inside the wrapper of an
    embedding with trained rows is left out.
    """
    layers: dict[str, AdapterLayer] = {}
    inside = "\0"  # no name starts with it
    for name, module in model.named_modules():
        if hasattr(module, "_disable_adapters") and not name.startswith(inside):
            layers[name] = module
            if hasattr(module, "token_adapter"):
                inside = name + "."
    return layers


@contextmanager
def as_reference(model: nn.Module) -> Iterator[None]:
    """Within this context, the model computes as its reference.

    The frozen adapter, if there is one, is active instead of the trained one. Otherwise all adapters are off.
    """
    # peft's own switches also change requires_grad, which FSDP reads once, at the first forward.
    layers: list[AdapterLayer] = [module for module in model.modules() if hasattr(module, "_disable_adapters")]
    before = [(layer._active_adapter, layer._disable_adapters) for layer in layers]
    started_from_adapter = any(REFERENCE in getattr(layer, "lora_A", ()) for layer in layers)
    try:
        for layer in layers:
            if started_from_adapter:
                layer._active_adapter = [REFERENCE]
            else:
                layer._disable_adapters = True
        yield
    finally:
        for layer, (active, disabled) in zip(layers, before, strict=True):
            layer._active_adapter, layer._disable_adapters = active, disabled


def adapter_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return the weights of all adapters, frozen ones included."""
    layers = adapter_layers(model).values()
    base_ids = {id(parameter) for layer in layers for parameter in _original(layer).parameters()}
    parameters = {id(parameter): parameter for layer in layers for parameter in layer.parameters()}
    return [parameter for key, parameter in parameters.items() if key not in base_ids]


def _original(layer: AdapterLayer) -> nn.Module:
    # The layer that peft replaced. peft wraps embeddings with trained rows twice, and experts once for each tensor.
    original: nn.Module = layer.original_module if hasattr(layer, "token_adapter") else layer.get_base_layer()
    return original


# The LM head


def plain_head(head: AdapterLayer) -> bool:
    """Whether the LM head is a linear layer, with or without plain LoRA around it."""
    base = head.base_layer if hasattr(head, "lora_A") else head
    plain = not getattr(head, "lora_variant", {}) and not any(getattr(head, "lora_bias", {}).values())
    return plain and type(base) in (nn.Linear, Linear) and type(base.weight) is nn.Parameter


def head_delta(head: AdapterLayer, states: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return what LoRA adds to the logits of a plain head, as two factors.

    Args:
        head: the LM head, for which :func:`plain_head` holds.
        states: hidden states [M, H].

    Returns:
        ``low`` [M, r] and ``up`` [V, r]: the adapter adds low · upᵀ to the logits [M, V]. None: it adds nothing.
    """
    if not hasattr(head, "lora_A") or head.disable_adapters:
        return None
    (name,) = head.active_adapters
    down, up = head.lora_A[name], head.lora_B[name]
    low: Tensor = down(head.lora_dropout[name](states.to(down.weight.dtype)))
    return low * head.scaling[name], up.weight.to(low.dtype)


# Identity: whether two models compute the same numbers, however their weights are stored. All ranks of a sharded model
# must call these functions together.


def plain_name(name: str) -> str:
    """Return the name of a base weight in the model without adapters."""
    return name.replace(".base_layer", "")


def base_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the state dict that the model would have without adapters. It has the model's tensors, not copies."""
    adapter_ids = {id(parameter) for parameter in adapter_parameters(model)}
    state = model.state_dict(keep_vars=True)
    return {plain_name(name): tensor for name, tensor in state.items() if id(tensor) not in adapter_ids}


def effective_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors that the model's outputs depend on, by their names in the model without adapters.

    Adapters that add nothing (B = 0, as at the start of training) are left out. So the result for a new adapter equals
    the state dict of the base model, and both have the same key in the cache of reference log-probs.
    """
    state = dict(model.state_dict())
    for name, layer in adapter_layers(model).items():
        for adapter, up in getattr(layer, "lora_B", {}).items():
            if adapter == REFERENCE or not full_tensor(up.weight).any():
                for factor in ("lora_A", "lora_B"):
                    state.pop(f"{name}.{factor}.{adapter}.weight")
            else:
                state[f"{name}.scaling.{adapter}"] = torch.tensor(float(layer.scaling[adapter]))
    return {plain_name(name): tensor for name, tensor in state.items()}


def fingerprint(model: nn.Module) -> Tensor:
    """Return 16 bytes (uint8) that identify the model: a hash of names, shapes, dtypes and 64 values of each weight.

    Every run with adapters computes it at its start, when hashing all values would take too long.
    """
    digest = hashlib.sha256()
    for name, tensor in effective_state(model).items():
        full = full_tensor(tensor.detach())
        values = full.flatten()
        values = values[:: max(1, len(values) // 64)][:64].cpu().contiguous()
        digest.update(f"{name} {values.dtype} {tuple(full.shape)}".encode())
        digest.update(values.view(torch.uint8).numpy().tobytes())
    return torch.tensor(list(digest.digest()[:16]), dtype=torch.uint8)


# Checkpoints. A backbone with adapters saves what it trains and a fingerprint of the frozen base, instead of a copy of
# the base in every checkpoint. This is done in hooks of state_dict and load_state_dict, which Lightning, FSDP2 and the
# moving reference all call, so none of them has to handle adapters.


def keep_only_adapters(backbone: nn.Module) -> None:
    """Restrict the backbone's state dict to the trained weights and a fingerprint of the frozen ones.

    ``load_state_dict(strict=True)`` still refuses missing and unexpected entries. It also raises ``ValueError`` if the
    adapters were trained on another base. A policy on the meta device gets its fingerprint from :func:`mark_base`,
    once it has weights.
    """
    # A buffer moves with the module's device and is in the state dict. A plain attribute would do neither.
    backbone.register_buffer(BASE, torch.zeros(16, dtype=torch.uint8))
    if not any(parameter.is_meta for parameter in backbone.parameters()):
        mark_base(backbone)
    backbone.register_state_dict_post_hook(_drop_frozen)
    # The base is checked before anything is copied: a refused checkpoint leaves the model as it was.
    backbone.register_load_state_dict_pre_hook(_check_base)
    backbone.register_load_state_dict_post_hook(_ignore_missing_frozen)


def mark_base(backbone: nn.Module) -> None:
    """Store the fingerprint of the weights that the adapters are trained on.

    All ranks of a sharded policy must call this function together.
    """
    backbone.get_buffer(BASE).copy_(fingerprint(backbone.get_submodule("policy")))


def _saved_names(backbone: nn.Module) -> set[str]:
    # Computed at each call and not once: FSDP2 replaces the parameters, and requires_grad is set after construction.
    return {BASE, *(name for name, parameter in backbone.named_parameters() if parameter.requires_grad)}


def _drop_frozen(backbone: nn.Module, state: dict[str, Tensor], prefix: str, _: object) -> None:
    # The state dict is one dict for the whole tree of modules, which each module extends. The names that start with
    # the backbone's prefix are its own; the objective's other entries (a value head's) stay.
    saved = {prefix + name for name in _saved_names(backbone)}
    for name in [name for name in state if name.startswith(prefix) and name not in saved]:
        del state[name]


def _check_base(backbone: nn.Module, state: Mapping[str, Tensor], prefix: str, *_: object) -> None:
    stored = state.get(prefix + BASE)
    if stored is None:
        raise ValueError("resume: expected a checkpoint of LoRA adapters (model.lora.enabled=true), found none in it")
    if not torch.equal(stored.cpu(), backbone.get_buffer(BASE).cpu()):
        raise ValueError(
            "resume: the checkpoint's adapter was trained on another base: expected that of model.path, "
            "model.lora.path and precision as they are now"
        )


def _ignore_missing_frozen(backbone: nn.Module, incompatible: _IncompatibleKeys) -> None:
    # Strict loading lists every parameter that the checkpoint lacks. Frozen ones were never saved, so their names are
    # removed from the list. All modules share the list: a missing weight of a value head must stay on it. The hook does
    # not get the prefix under which the backbone was loaded, so it compares the endings of names; the dot keeps
    # "a.weight" from matching "data.weight".
    names = chain(backbone.named_parameters(remove_duplicate=False), backbone.named_buffers(remove_duplicate=False))
    frozen = {name for name, _ in names} - _saved_names(backbone)
    endings = tuple("." + name for name in frozen)
    incompatible.missing_keys[:] = [name for name in incompatible.missing_keys if not ("." + name).endswith(endings)]


# Export


def merge_adapter(model: PreTrainedModel) -> None:
    """Add the trained adapter to the weights and restore the model's own layers. The model cannot train further."""
    for name, layer in reversed(adapter_layers(model).items()):
        # An embedding with trained rows is a wrapper, whose own adapter is one level further inside.
        adapter: AdapterLayer = getattr(layer, "token_adapter", layer)
        adapter.merge(adapter_names=[POLICY])
        model.set_submodule(name, _original(layer))
    if hasattr(model, "peft_config"):
        del model.peft_config


def save_adapter(model: PreTrainedModel, folder: Path) -> None:
    """Write the trained adapter as peft's files: adapter_config.json and adapter_model.safetensors."""
    from peft import get_peft_model_state_dict

    state: Mapping[str, Tensor] = get_peft_model_state_dict(model, adapter_name=POLICY, save_embedding_layers=False)
    # peft's own loader expects the names that the model has inside a PeftModel.
    tensors = {f"base_model.model.{name}": tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    config: Any = copy.copy(model.peft_config[POLICY])
    config.inference_mode = True
    config.save_pretrained(str(folder))
