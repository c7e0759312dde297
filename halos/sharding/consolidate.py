"""Convert a sharded checkpoint folder into one file that every strategy resumes from."""

from __future__ import annotations

import argparse
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

from halos.files import atomic_file
from halos.sharding.fsdp import by_position

META = "meta.pt"
"""Lightning's name for the file with all that is not sharded. It is written last, so a folder with it is complete."""
_ALLOWED = ("torch.distributed.checkpoint.", "torch.serialization", "torch._utils", "torch.storage")


class _Metadata(pickle.Unpickler):
    # PyTorch's index of a folder is a pickle, and a pickle can run any code. Only classes that describe tensors are
    # allowed in it.
    def find_class(self, module: str, name: str) -> object:
        harmless = {("torch", "Size"), ("pathlib", "PosixPath"), ("collections", "OrderedDict")}
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if (module, name) in harmless or module.startswith(_ALLOWED):
            return super().find_class(module, name)
        raise ValueError(f"unexpected {module}.{name}")


def check_sharded(folder: Path, key: str = "resume") -> Path:
    """Return the folder if it is a complete sharded checkpoint. Raises ``ValueError`` that names ``key`` otherwise."""
    if not (folder / ".metadata").is_file() or not zipfile.is_zipfile(folder / META):
        raise ValueError(f"{key}: expected a checkpoint, found the folder {folder}, which is none or incomplete")
    try:
        with (folder / ".metadata").open("rb") as stream:
            _Metadata(stream).load()
    except Exception as error:  # whatever a damaged pickle raises
        raise ValueError(f"{key}: {folder}/.metadata is damaged or something else: {error}") from error
    return folder


def consolidate(folder: Path, file: Path) -> None:
    """Load all shards into this process's memory and write them as one checkpoint file.

    Args:
        folder: a sharded checkpoint.
        file: the file to write. It is complete or not there at all.

    Raises:
        ValueError: the folder is no complete sharded checkpoint, or the file exists.
    """
    check_sharded(folder, "consolidate")
    if file.exists():
        raise ValueError(f"consolidate: expected a new file, found {file}, which exists")
    # torch.distributed.checkpoint.format_utils.dcp_to_torch_save does the same, but unpickles the index unchecked.
    state: dict[str, Any] = {}
    _load_state_dict(state, FileSystemReader(folder), planner=_EmptyStateDictLoadPlanner(), no_dist=True)
    checkpoint: dict[str, Any] = torch.load(folder / META, map_location="cpu", weights_only=True)
    checkpoint["state_dict"] = state.pop("state_dict")
    checkpoint["optimizer_states"] = [by_position(state[name]) for name in sorted(state)]  # optimizer_0, …
    with atomic_file(file) as part:
        torch.save(checkpoint, part)


def sharded_weights(folder: Path) -> dict[str, Tensor]:
    """Load the weights of a sharded checkpoint, and nothing else of it, into this process's memory."""
    check_sharded(folder, "checkpoint")
    state: dict[str, Any] = {}
    planner = _EmptyStateDictLoadPlanner(keys={"state_dict"})
    _load_state_dict(state, FileSystemReader(folder), planner=planner, no_dist=True)
    weights: dict[str, Tensor] = state["state_dict"]
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
