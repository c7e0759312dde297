"""What the rest has to know of a model with LoRA adapters (peft's layers, put in place of linear ones).

The adapter ``default`` is trained. A frozen one named ``reference`` exists where training continues an adapter that
is part of the reference. Nothing here imports peft: its layers are known by what they carry.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from halos.policy.kernels.matmul import Linear
from halos.processes.collectives import full_tensor

POLICY, REFERENCE = "default", "reference"
"""Names of the trained adapter and of the frozen one."""
BASE = "base_fingerprint"


def adapter_layers(model: nn.Module) -> dict[str, Any]:
    """The layers that peft put in place of others, by name; layers inside such a layer are left out."""
    found: dict[str, Any] = {}
    inside = "\0"
    for name, module in model.named_modules():
        if hasattr(module, "_disable_adapters") and not name.startswith(inside):
            found[name], inside = module, name + "."
    return found


@contextmanager
def as_reference(model: nn.Module) -> Iterator[None]:
    """Within, the model is its reference: the frozen adapter takes the place of the trained one, or none does."""
    # peft's own switches also change requires_grad, which FSDP reads once, at the first forward.
    layers: list[Any] = [module for module in model.modules() if hasattr(module, "_disable_adapters")]
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
    """All weights of adapters, frozen ones included."""
    bases = {id(p) for layer in adapter_layers(model).values() for p in _inside(layer).parameters()}
    return [p for layer in adapter_layers(model).values() for p in layer.parameters() if id(p) not in bases]


def _inside(layer: Any) -> Any:
    # The layer that was there before. peft wraps embeddings with trained rows twice.
    return layer.original_module if hasattr(layer, "token_adapter") else layer.base_layer


# The LM head


def plain_head(head: Any) -> bool:
    """Whether the head is a linear layer, with nothing more to it than plain LoRA."""
    base = head.base_layer if hasattr(head, "lora_A") else head
    plain = not getattr(head, "lora_variant", {}) and not any(getattr(head, "lora_bias", {}).values())
    return plain and type(base) in (nn.Linear, Linear) and type(base.weight) is nn.Parameter


def head_delta(head: Any, states: Tensor) -> tuple[Tensor, Tensor] | None:
    """What LoRA adds to the logits of a plain head, as two factors: ``low`` [M, r] · ``up`` [V, r]ᵀ; None: nothing."""
    if not hasattr(head, "lora_A") or head.disable_adapters:
        return None
    (name,) = head.active_adapters
    low = head.lora_A[name](head.lora_dropout[name](states.to(head.lora_A[name].weight.dtype)))
    return low * head.scaling[name], head.lora_B[name].weight.to(low.dtype)


# Identity: what the model computes with, told from how it is held. All ranks have to ask for that of a sharded model.


def plain_name(name: str) -> str:
    """The name that a base weight has in the model without adapters."""
    return name.replace(".base_layer.", ".")


def base_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of the model without its adapters, as it would be without any: the tensors themselves."""
    own = {id(p) for p in adapter_parameters(model)}
    return {plain_name(name): p for name, p in model.state_dict(keep_vars=True).items() if id(p) not in own}


def effective_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict without adapters that add nothing (B = 0, as when training starts) and under the names that the
    model has without any: with a new adapter it is that of the base model."""
    state = dict(model.state_dict())
    for name, layer in adapter_layers(model).items():
        for adapter, up in getattr(layer, "lora_B", {}).items():
            if adapter == REFERENCE or not full_tensor(up.weight).any():
                for part in ("lora_A", "lora_B"):
                    state.pop(f"{name}.{part}.{adapter}.weight")
            else:
                state[f"{name}.scaling.{adapter}"] = torch.tensor(float(layer.scaling[adapter]))
    return {plain_name(name): tensor for name, tensor in state.items()}


def fingerprint(model: nn.Module) -> Tensor:
    """16 bytes that tell one starting point from another: names, shapes, types and samples of all weights."""
    digest: Any = hashlib.sha256()
    for name, tensor in effective_state(model).items():
        tensor = full_tensor(tensor.detach())
        values = tensor.flatten()
        values = values[:: max(1, len(values) // 64)][:64].cpu().contiguous()
        digest.update(f"{name} {values.dtype} {tuple(tensor.shape)}".encode())
        digest.update(values.view(torch.uint8).numpy())
    return torch.tensor(list(digest.digest()[:16]), dtype=torch.uint8)


# Checkpoints


def keep_only_adapters(backbone: Any) -> None:
    """From now on the backbone's state dict is what is trained, and a fingerprint of what is not.

    Loading it is as strict as ever about what it holds, and raises ``ValueError`` if it was trained on another base.
    A policy on the meta device gets its fingerprint from :func:`mark_base`, once it has weights.
    """
    backbone.register_buffer(BASE, torch.zeros(16, dtype=torch.uint8))
    if not any(parameter.is_meta for parameter in backbone.policy.parameters()):
        mark_base(backbone)
    backbone.register_state_dict_post_hook(_drop_frozen)
    backbone.register_load_state_dict_pre_hook(_check_base)
    backbone.register_load_state_dict_post_hook(_miss_no_frozen)


def mark_base(backbone: Any) -> None:
    """Note which weights the adapters are trained on; all ranks have to call it if the policy is sharded."""
    getattr(backbone, BASE).copy_(fingerprint(backbone.policy))


def _kept(backbone: nn.Module) -> set[str]:
    return {BASE, *(name for name, parameter in backbone.named_parameters() if parameter.requires_grad)}


def _drop_frozen(backbone: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    kept = _kept(backbone)
    for name in [name for name in state if name.startswith(prefix) and name.removeprefix(prefix) not in kept]:
        del state[name]


def _check_base(backbone: Any, state: Mapping[str, Any], prefix: str, *_: Any) -> None:
    found = state.get(prefix + BASE)
    if found is None:
        raise ValueError("resume: expected a checkpoint of LoRA adapters (model.lora.enabled=true), found none in it")
    if not torch.equal(found.cpu(), getattr(backbone, BASE).cpu()):
        raise ValueError(
            "resume: the checkpoint's adapter was trained on another base: expected that of model.path, "
            "model.lora.path and precision as they are now"
        )


def _miss_no_frozen(backbone: nn.Module, incompatible: Any) -> None:
    kept = tuple("." + name for name in _kept(backbone))
    incompatible.missing_keys[:] = [name for name in incompatible.missing_keys if ("." + name).endswith(kept)]


# Export


def merge_adapter(model: Any) -> None:
    """Add the trained adapter to the weights, and give the model its own layers back; it trains no further."""
    for name, layer in adapter_layers(model).items():
        getattr(layer, "token_adapter", layer).merge(adapter_names=[POLICY])
        model.set_submodule(name, _inside(layer))
    if hasattr(model, "peft_config"):
        del model.peft_config


def save_adapter(model: Any, folder: Path) -> None:
    """The trained adapter as peft's files: adapter_config.json and adapter_model.safetensors."""
    from peft import get_peft_model_state_dict

    state = get_peft_model_state_dict(model, adapter_name=POLICY, save_embedding_layers=False)
    tensors = {f"base_model.model.{name}": tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    config = copy.copy(model.peft_config[POLICY])
    config.inference_mode = True
    config.save_pretrained(folder)
