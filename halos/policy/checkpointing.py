"""``model.gradient_checkpointing``: what a decoder layer keeps for its backward pass, and where.

    false       every activation, on the device
    true        the layer's input; all else is computed again
    selective   the input, and the outputs of linear layers and of fused attention; all else is computed again
    offload     as true, with the input in the host's memory until the backward pass

A model of transformers calls its layers through the function ``_gradient_checkpointing_func``, which is PyTorch's
``checkpoint`` with options. ``selective`` and ``offload`` set options of it or wrap it, so no code of a model is
changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from halos.policy.kernels.device_types import device_type

if TYPE_CHECKING:
    from transformers import PreTrainedModel

KEY = "model.gradient_checkpointing"
NAMED_POLICIES = ("selective", "offload")
FUNCTION = "_gradient_checkpointing_func"
"""The attribute in which a layer has the function that runs it."""
KEPT_PRODUCTS = {"aten::mm", "aten::addmm", "mkldnn::_linear_pointwise"}
KEPT_PRODUCTS |= {"aten::_grouped_mm", "transformers::grouped_mm_fallback"}  # of experts
"""Products with weights. Not ``aten::bmm``: attention that is not fused computes all its scores by that."""
KEPT_ATTENTION = {
    f"aten::_scaled_dot_product_{kernel}"
    for kernel in ("flash_attention", "flash_attention_for_cpu", "efficient_attention", "cudnn_attention")
}

Contexts = tuple[AbstractContextManager[object], AbstractContextManager[object]]
"""Of a layer's first run, and of its run in the backward pass."""


def check_policy(policy: bool | str) -> None:
    """Raise ``ValueError`` unless the setting is true, false or one of :data:`NAMED_POLICIES`."""
    if not isinstance(policy, bool) and policy not in NAMED_POLICIES:
        raise ValueError(f"{KEY}: expected true, false, {' or '.join(NAMED_POLICIES)}, found {policy!r}")


def checkpoint_layers(model: PreTrainedModel, policy: bool | str) -> None:
    """Let the model's decoder layers keep what the policy says, from the next forward pass in training mode on.

    Raises:
        ValueError: an unknown policy, or a model that does not support it.
    """
    check_policy(policy)
    if not policy:
        return
    options: dict[str, object] = {"use_reentrant": False}
    if policy == "selective":
        options["context_fn"] = _selective_contexts
    # transformers 5 renames it.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable(options)
    layers = checkpointed_layers(model)
    if isinstance(policy, str) and not layers:  # code of an older format, which ignores the options
        found = f"found {policy} for {type(model).__name__}, which does not pass options to PyTorch's checkpoint()"
        raise ValueError(f"{KEY}: expected true or false, {found}")
    if policy == "offload":
        for layer in layers:
            layer.__dict__[FUNCTION] = partial(_offloaded_checkpoint, use_reentrant=False)


def checkpointed_layers(model: nn.Module) -> list[nn.Module]:
    """Return the modules that run layers through :data:`FUNCTION`, which are mostly the layers themselves."""
    modules = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
    return [module for module in modules if FUNCTION in module.__dict__]


# selective


def _selective_contexts() -> Contexts:
    first, again = create_selective_checkpoint_contexts(_policy_of)
    return first, _explained(again)


@contextmanager
def _explained(context: AbstractContextManager[object]) -> Iterator[None]:
    try:
        with context:
            yield
    except RuntimeError as error:
        if "has been mutated" not in str(error):
            raise
        found = "found selective for a model whose layers change results of products in place"
        raise ValueError(f"{KEY}: expected true or offload, {found}") from error


def _policy_of(_: object, operation: OpOverload, *args: object, **options: object) -> CheckpointPolicy:
    name = operation.name()
    keep = name in KEPT_PRODUCTS or name in KEPT_ATTENTION
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE


# offload


def _offloaded_checkpoint(function: Callable[..., object], *args: object, **options: Any) -> object:
    # These hooks are called for the arguments alone: within the layer, checkpoint() has hooks of its own. Parameters
    # are no arguments, and neither are masks and rotary embeddings, which all layers share.
    with saved_tensors_hooks(_to_host, _to_device):
        return checkpoint(function, *args, **options)


def _to_host(tensor: Tensor) -> tuple[torch.device | None, Tensor]:
    # The layer's input. Some architectures pass masks by position too, and these have no gradient.
    if not tensor.requires_grad or device_type(tensor) != "cuda":
        return None, tensor
    host = pinned_like(tensor)
    # The host does not wait. PyTorch frees neither of the two before the copy is done: memory of the device is used
    # again by later work of the same stream only, and pinned memory after an event that the copy records.
    host.copy_(tensor, non_blocking=True)
    return tensor.device, host


def _to_device(packed: tuple[torch.device | None, Tensor]) -> Tensor:
    device, tensor = packed
    if device is None:
        return tensor
    return torch.empty_like(tensor, device=device).copy_(tensor, non_blocking=True)


def pinned_like(tensor: Tensor) -> Tensor:
    """Return new memory of the host, which a GPU can copy to without the host."""
    return torch.empty_like(tensor, device="cpu", pin_memory=True)


# For other code that has to be in force when a layer runs again


def recomputes_within_contexts(model: nn.Module) -> bool:
    """Return whether :func:`recomputed_within` works for all checkpointed layers of the model, if it has any."""
    # checkpoint() with use_reentrant=True takes no context_fn.
    functions = [layer.__dict__[FUNCTION] for layer in checkpointed_layers(model)]
    return all(getattr(function, "keywords", {}).get("use_reentrant") is False for function in functions)


@contextmanager
def recomputed_within(model: nn.Module, context: Callable[[], AbstractContextManager[None]]) -> Iterator[None]:
    """Layers that run within this context run again within ``context()``, in the backward pass."""
    with ExitStack() as restored:
        for layer in checkpointed_layers(model):
            function = layer.__dict__[FUNCTION]
            restored.callback(setattr, layer, FUNCTION, function)
            context_fn = function.keywords.get("context_fn", _no_contexts)
            layer.__dict__[FUNCTION] = partial(function, context_fn=partial(_with_context, context_fn, context))
        yield


def _no_contexts() -> Contexts:
    return nullcontext(), nullcontext()


def _with_context(context_fn: Callable[[], Contexts], context: Callable[[], AbstractContextManager[None]]) -> Contexts:
    first, again = context_fn()
    return first, _both(context(), again)


@contextmanager
def _both(outer: AbstractContextManager[None], inner: AbstractContextManager[object]) -> Iterator[None]:
    with outer, inner:
        yield
