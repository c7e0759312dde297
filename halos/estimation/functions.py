"""Attention and autocast on the meta device, as a CPU or a CUDA device has them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from itertools import product
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
import torch.optim.optimizer as optimizers
import torch.utils._foreach_utils as foreach
from torch import Tensor
from torch.autograd.graph import _engine_run_backward
from torch.overrides import TorchFunctionMode

from halos.policy.kernels.device_types import traced_as

aten = torch.ops.aten
LOWERED = {
    *(F.linear, torch.matmul, torch.mm, torch.bmm, torch.addmm, torch.baddbmm),
    *(Tensor.matmul, Tensor.__matmul__, Tensor.__rmatmul__, Tensor.mm, Tensor.bmm),
}
"""Functions that autocast computes in its lower precision."""
COPIES = "compute copies"
"""The label of weights that autocast has rounded, and keeps until the end of the forward pass."""
HOST = "host"
"""The label of memory that is the host's, and not the device's."""
SUPPORTED = ("_get_fused_kernels_supported_devices", "_get_foreach_kernels_supported_devices")
"""PyTorch's functions that list the devices with kernels for the weights of a whole optimizer."""


Label = Callable[[str, list[Tensor]], None]
Labelled = Callable[[str], AbstractContextManager[None]]


class DeviceFunctions(TorchFunctionMode):
    """Within this mode, functions of tensors on the meta device do what they do on another type of device.

    Args:
        device: ``cpu`` or ``cuda``.
        label: called with a label and tensors that it is for.
        labelled: makes a context within which new memory gets a label.
    """

    def __init__(self, device: str, label: Label, labelled: Labelled) -> None:
        super().__init__()
        self.device, self._label, self._labelled = device, label, labelled
        self._copies: dict[int, tuple[Tensor, Tensor]] = {}
        self._keeps = True

    @contextmanager
    def autocast(self, dtype: torch.dtype | None, *, keep: bool = True) -> Iterator[None]:
        """Within, products are computed in this precision; None: in that of their arguments.

        Args:
            dtype: the precision.
            keep: whether a weight is cast once and its copy kept, as in a forward pass.
        """
        if dtype is None:
            yield
            return
        self._keeps = keep
        torch.set_autocast_dtype(self.device, dtype)
        torch.set_autocast_enabled(self.device, True)
        try:
            yield
        finally:
            torch.set_autocast_enabled(self.device, False)
            self._copies.clear()

    def backward(self, loss: Tensor) -> None:
        """Compute gradients, and layers again in this mode, which ``loss.backward()`` would switch off."""
        _engine_run_backward(
            (loss,), (torch.ones_like(loss),), False, False, (), allow_unreachable=True, accumulate_grad=True
        )

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> object:
        kwargs = kwargs or {}
        if kwargs.get("pin_memory"):  # the host's; its stand-in is on the meta device, too
            options = {key: value for key, value in kwargs.items() if key not in ("device", "pin_memory")}
            with self._labelled(HOST):
                return func(*args, **options)
        attends = func is F.scaled_dot_product_attention
        if (attends or func in LOWERED) and torch.is_autocast_enabled(self.device):
            dtype = torch.get_autocast_dtype(self.device)
            args = tuple(self._lowered(arg, dtype) for arg in args)
        return self._attend(*args, **kwargs) if attends else func(*args, **kwargs)

    def _lowered(self, value: object, dtype: torch.dtype) -> object:
        if not isinstance(value, Tensor) or value.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            return value
        # Autocast casts other tensors, and frozen weights, each time.
        if not (self._keeps and value.is_leaf and value.requires_grad and value.dtype == torch.float32):
            return value.to(dtype)
        if id(value) not in self._copies:
            self._copies[id(value)] = value, value.to(dtype)
            self._label(COPIES, [self._copies[id(value)][1]])
        return self._copies[id(value)][1]

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """The kernel that PyTorch would choose; all of them keep no scores for the backward pass."""
        mask = attn_mask
        if mask is not None and mask.dtype == torch.bool:  # PyTorch makes numbers of it
            mask = torch.zeros_like(mask, dtype=query.dtype)
        output: Tensor
        if self.device == "cpu":
            attend = aten._scaled_dot_product_flash_attention_for_cpu
            output = attend(query, key, value, dropout_p, is_causal, attn_mask=mask, scale=scale)[0]
        elif mask is None and query.dtype != torch.float32:
            attend = aten._scaled_dot_product_flash_attention
            output = attend(query, key, value, dropout_p, is_causal, scale=scale)[0]
        else:
            if mask is not None:
                mask = mask.expand(len(query), query.shape[1], *mask.shape[-2:])
            if enable_gqa:
                groups = query.shape[1] // key.shape[1]
                key, value = (states.repeat_interleave(groups, 1) for states in (key, value))
            keep = torch.is_grad_enabled()
            attend = aten._scaled_dot_product_efficient_attention
            output = attend(query, key, value, mask, keep, dropout_p, is_causal, scale=scale)[0]
        return output


@contextmanager
def as_on(device: str, label: Label, labelled: Labelled) -> Iterator[DeviceFunctions]:
    """Within this context, tensors on the meta device are computed as those on a type of device."""
    autocast = torch.autocast

    def known_device(device_type: str, *args: Any, **options: Any) -> torch.autocast:
        return autocast(device if device_type == "meta" else device_type, *args, **options)

    def with_meta(supported: Callable[[], list[str]]) -> Callable[[], list[str]]:
        return lambda: [*supported(), "meta"] if device in supported() else supported()

    with ExitStack() as stack:
        stack.enter_context(traced_as(device))
        # peft switches autocast off around adapters on experts, and PyTorch has none for the meta device.
        stack.enter_context(mock.patch.object(torch, "autocast", known_device))
        for module, name in product((optimizers, foreach), SUPPORTED):
            stack.enter_context(mock.patch.object(module, name, with_meta(getattr(module, name))))
        yield stack.enter_context(DeviceFunctions(device, label, labelled))
