"""Convert a sharded checkpoint folder into one file that every strategy resumes from."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

from halos.files import atomic_file
from halos.sharding.fsdp import by_position
from halos.sharding.reading import check_sharded, read_entries, read_meta


def consolidate(folder: Path, file: Path) -> None:
    """Load all shards into this process's memory and write them as one checkpoint file.

    Args:
        folder: a sharded checkpoint.
        file: the file to write. It is complete or not there at all.

    Raises:
        ValueError: the folder is not a complete sharded checkpoint, or has entries that are neither tensors nor plain
            values, or the file exists already.
    """
    check_sharded(folder, "consolidate")
    if file.exists():
        raise ValueError(f"consolidate: expected a new file, found {file}, which exists")
    state = read_entries(folder)
    checkpoint = read_meta(folder)
    checkpoint["state_dict"] = state.pop("state_dict")
    checkpoint["optimizer_states"] = [by_position(state[name]) for name in sorted(state)]  # optimizer_0, …
    with atomic_file(file) as part:
        torch.save(checkpoint, part)


def sharded_weights(folder: Path) -> dict[str, Tensor]:
    """Load the weights of a sharded checkpoint, and nothing else of it, into this process's memory."""
    check_sharded(folder, "checkpoint")
    weights: dict[str, Tensor] = read_entries(folder, {"state_dict"})["state_dict"]
    return weights


def main() -> None:
    """Run the command ``consolidate FOLDER FILE``."""
    parser = argparse.ArgumentParser(description="Make one checkpoint file of a sharded checkpoint folder.")
    parser.add_argument("folder", type=Path, help="a folder that strategy.trainer.sharded_checkpoints=true wrote")
    parser.add_argument("file", type=Path, help="the file to write: resume=FILE continues from it with any strategy")
    options = parser.parse_args()
    try:
        consolidate(options.folder, options.file)
    except ValueError as error:
        parser.exit(1, f"error: {error}\n")
    print(f"{options.file}: continue with resume={options.file}")
