"""Devices, number types and strategies that a configuration names."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import TYPE_CHECKING, TypeVar, cast

import torch
from omegaconf import DictConfig

from halos.checks import check_choice
from halos.config.nodes import build

if TYPE_CHECKING:
    from lightning.pytorch.strategies import Strategy

Option = TypeVar("Option")

DTYPES = {"32-true": torch.float32, "bf16-true": torch.bfloat16}


def device_of(name: str) -> torch.device:
    """Return the device of this name; ``auto`` is a GPU where there is one.

    Raises:
        ValueError: the name is not a device, or this machine does not have the device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(str(name))
    except RuntimeError as error:
        raise ValueError(f"device: expected auto, cpu, cuda or cuda:N, found {name!r}") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device: expected cpu or one of {torch.cuda.device_count()} CUDA devices, found {name!r}")
    return device


def check_place(device: str, precision: str) -> None:
    """Raise ``ValueError`` for a device that is not on this machine, and for an unknown precision."""
    device_of(device)
    choice("precision", precision, DTYPES)


def choice(key: str, value: str, options: Mapping[str, Option]) -> Option:
    """Return ``options[value]``, or raise a ``ValueError`` that names the key and lists the options."""
    check_choice(key, value, options)
    return options[value]


def build_strategy(node: DictConfig) -> Strategy | str:
    """Build the strategy of a ``strategy`` node. A plain name is returned for Lightning to look up.

    Raises:
        ValueError: the strategy's package is not installed, or it does not take these parameters.
    """
    if node.name == "deepspeed" and importlib.util.find_spec("deepspeed") is None:
        install = "pip install 'halos[deepspeed]'"
        raise ValueError(f"strategy: expected the package deepspeed for strategy=deepspeed, found none; {install}")
    if isinstance(node.trainer, str):
        return node.trainer
    return cast("Strategy", build(node.trainer))
