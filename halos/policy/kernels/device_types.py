"""The type of device that computes a tensor, which decides about kernels, blocks and precisions."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor

_meta_stands_for: ContextVar[str] = ContextVar("meta_stands_for", default="meta")


def device_type(tensor: Tensor) -> str:
    """Return ``cpu``, ``cuda``, …; for a tensor on the meta device the device that :func:`traced_as` names."""
    device = tensor.device.type
    return _meta_stands_for.get() if device == "meta" else device


@contextmanager
def traced_as(device: str) -> Iterator[None]:
    """Within this context, code computes tensors on the meta device as it does those on the given type of device."""
    token = _meta_stands_for.set(device)
    try:
        yield
    finally:
        _meta_stands_for.reset(token)
