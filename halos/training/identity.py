"""What two runs must have in common for one to go on from the other's checkpoint."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

GROUPS = ("loss", "optim", "humanline", "reference_sync")
"""Groups of the configuration of which every value counts."""
MODEL = ("random_weights", "dropout", "lora", "reference_path")
"""Keys of the model, beside its files, that count; the others change speed and memory only."""
ORDER = ("stratified", "keep_together")
"""Keys of the data that decide which examples make up a step; the rows themselves have a key of their own."""
WEIGHTS = (".safetensors", ".bin", ".gguf", ".json")
EDGE = 1 << 16
"""Bytes at both ends of a file of weights that are looked at, with its size: whole models would take minutes."""


def identity(
    cfg: DictConfig, data: Mapping[str, str], *, model: Path | None, examples_per_step: int, accumulate: int
) -> dict[str, Any]:
    """{key: value}: the objective, the optimizer, the model, the data to the token, their order, and the seed.

    ``data``: a key of the rows of each split. ``model``: the local file or folder of its weights, if it has one.
    ``accumulate``: micro-batches a step; a checkpoint counts in them how far the data was read.
    """
    nodes: Any = OmegaConf.to_container(cfg, resolve=True)
    found = {key: value for group in GROUPS for key, value in _flat(nodes[group], group)}
    found["model.path"] = f"{model.name} ({weights_key(model)})" if model else cfg.model.path
    found |= {key: value for name in MODEL for key, value in _flat(nodes["model"].get(name), f"model.{name}")}
    found |= {f"data ({split})": key for split, key in data.items()}
    found |= {f"data.{name}": nodes["data"].get(name) for name in ORDER}
    found |= {"examples per step": examples_per_step, "micro-batches per step": accumulate}
    found |= {"precision": cfg.precision, "seed": cfg.seed}
    return found


def _flat(node: Any, name: str) -> list[tuple[str, Any]]:
    if isinstance(node, dict):
        return [pair for key, value in node.items() for pair in _flat(value, f"{name}.{key}")]
    return [(name, node)]


def weights_key(model: Path) -> str:
    """A key of a model: its file or folder of weights and configs, at the edges and the size of each."""
    files = sorted(file for file in model.iterdir() if file.suffix in WEIGHTS) if model.is_dir() else [model]
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with file.open("rb") as stream:
            digest.update(stream.read(EDGE))
            stream.seek(max(0, size - EDGE))
            digest.update(stream.read())
    return digest.hexdigest()[:12]
