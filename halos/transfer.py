"""Copies numbers to a device without making the host wait for it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def on_device(
    values: Sequence[float] | np.ndarray | Tensor, *, device: torch.device, dtype: torch.dtype | None = None
) -> Tensor:
    """Return the values as a tensor on the device.

    ``torch.tensor(values, device="cuda")`` and ``tensor.to("cuda")`` wait until the device has done all earlier work,
    because CUDA copies asynchronously only from pinned memory. PyTorch keeps the pinned memory until the copy is done.

    Args:
        values: numbers in the host's memory.
        device: the device that needs them.
        dtype: the type of the tensor; None: that of the values.
    """
    tensor = torch.as_tensor(values, dtype=dtype)
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def as_like(values: Sequence[float], tensor: Tensor) -> Tensor:
    """Return numbers in the tensor's type and on its device."""
    return on_device(values, device=tensor.device, dtype=tensor.dtype)
