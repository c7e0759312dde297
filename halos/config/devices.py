"""Devices and number types that a configuration names."""

from __future__ import annotations

from typing import Any

import torch

DTYPES = {"32-true": torch.float32, "bf16-true": torch.bfloat16}


def device_of(name: str) -> torch.device:
    """``auto`` is a GPU where there is one. Raises ``ValueError`` for a device that is none or not here."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(str(name))
    except RuntimeError as error:
        raise ValueError(f"device: expected auto, cpu, cuda or cuda:N, found {name!r}") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device: expected cpu or one of {torch.cuda.device_count()} CUDA devices, found {name!r}")
    return device


def check_place(device: Any, precision: Any) -> None:
    """Raise ``ValueError`` for a device that is not here, and for an unknown precision."""
    device_of(device)
    choice("precision", precision, DTYPES)


def choice(key: str, value: Any, options: Any) -> Any:
    """``options[value]``, or a ``ValueError`` that lists them."""
    if value not in options:
        raise ValueError(f"{key}: expected one of {', '.join(options)}; found {value!r}")
    return options[value]
