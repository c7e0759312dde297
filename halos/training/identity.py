"""The settings that two runs must share for one to resume from the other's checkpoint."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from halos.files import name_size_and_ends

SETTINGS = (
    "loss.", "optim.", "humanline.", "reference_sync.", "precision", "seed",
    # The model's keys, in addition to its files; its other keys change speed and memory only.
    "model.revision", "model.random_weights", "model.dropout", "model.lora", "model.reference_path",
    # Of the data, which examples make up a step; the rows themselves have a key of their own.
    "data.stratified", "data.keep_together",
)  # fmt: skip
"""Beginnings of the configuration keys whose values must agree."""
EXPORT = "model.lora.export"
"""The only key of ``model.lora`` that does not change any result."""
WEIGHTS = (".safetensors", ".gguf")
"""Endings of the files of weights."""
CONFIGS = ("config.json", "adapter_config.json", "model.safetensors.index.json")
"""Names of the other files that log-probs depend on. The rows, which the tokenizer made, have a key of their own."""


def identity(
    settings: Mapping[str, object],
    data: Mapping[str, str],
    *,
    model: Path | None,
    examples_per_step: int,
    accumulate: int,
) -> dict[str, object]:
    """Return what identifies a run: objective, optimizer, model, the tokens of the data and their order, and the seed.

    Args:
        settings: the configuration by flat keys, such as ``loss.beta``.
        data: a key of the rows of each split.
        model: the local file or folder of the model's weights; None for a hub id.
        examples_per_step: over all devices and micro-batches of an optimizer step.
        accumulate: micro-batches in a step, in which a checkpoint counts how far the data were read.
    """
    path = f"{model.name} ({weights_key(model)})" if model else settings["model.path"]
    return {
        **{key: value for key, value in settings.items() if key.startswith(SETTINGS) and key != EXPORT},
        "model.path": path,
        **{f"data ({split})": key for split, key in data.items()},
        "examples per step": examples_per_step,
        "micro-batches per step": accumulate,
    }


def weights_key(model: Path) -> str:
    """Return a key of a model's file, or of the weights and configs in its folder: their names, sizes and ends."""
    files = [model]
    if model.is_dir():
        files = sorted(file for file in model.iterdir() if file.suffix in WEIGHTS or file.name in CONFIGS)
    return hashlib.sha256(b"".join(map(name_size_and_ends, files))).hexdigest()[:12]
