"""Limits for a model's config: a config of a kilobyte can describe a model that fits into no memory."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)

from halos.policy.checks import check_safetensors, weight_files

MOST = {"layer": 10_000, "expert": 100_000, "num_labels": 100_000}
"""The largest accepted numbers in a config, by a part of their name. transformers first makes lists of that length."""
SPARE_VALUES, SPARE_TENSORS = 25_000_000, 5_000
"""Weights and buffers that a model may have in addition to those in its files, which lack computed and tied ones."""


def check_config(file: Path, key: str = "model.path") -> None:
    """Check a ``config.json`` before transformers reads it.

    Raises:
        ValueError: it is not a JSON object, has a number that no real model has, or names a kernel of the hub (code).
    """
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{key}: expected JSON in {file}, found {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{key}: expected a JSON object in {file}, found another value")
    sections = [config]
    while sections:
        section = sections.pop()
        for name, value in section.items():
            if isinstance(value, dict):
                sections.append(value)
            # A kernel's name is owner/name. transformers would download and run it.
            if name.endswith("_implementation") and "/" in json.dumps(value):
                hint = "remove it, or choose by model.attention"
                raise ValueError(f"{key}: {file}: expected no kernel of the hub, found {name} = {value!r}; {hint}")
            for part, most in MOST.items():
                if part in name and isinstance(value, int | float) and value > most:
                    raise ValueError(f"{key}: {file}: expected up to {most:,} as {name}, found {value:.7g}")


class TooLarge(ValueError):
    """The config describes a model that is larger than its weight files."""


@contextmanager
def as_large_as_its_files(folder: Path, key: str = "model.path") -> Iterator[None]:
    """Let no model be built in this block that is much larger than the safetensors files of its folder.

    A model is built without memory and then filled, so nothing is allocated before the error.

    Raises:
        TooLarge: the model has more weights than the files can hold.
    """
    files = weight_files(folder, key)
    # A byte holds up to eight weights of a quantised model; others have a byte or more for each.
    values = 8 * sum(file.stat().st_size for file in files) + SPARE_VALUES
    tensors = 4 * sum(len(check_safetensors(file, key=key)) for file in files) + SPARE_TENSORS
    seen: set[int] = set()

    def count(module: nn.Module, name: str, tensor: object) -> None:
        nonlocal values
        if tensor is None or id(tensor) in seen:
            return
        seen.add(id(tensor))
        values -= tensor.numel()  # type: ignore[attr-defined]
        if values < 0 or len(seen) > tensors:
            hint = "its config.json is of another model"
            raise TooLarge(f"{key}: {folder} describes a model that is larger than its weights; {hint}")

    hooks = (register_module_parameter_registration_hook(count), register_module_buffer_registration_hook(count))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
