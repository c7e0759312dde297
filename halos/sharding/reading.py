"""Reads sharded checkpoint folders without running what is in them.

PyTorch's own reader unpickles the index of a folder (``.metadata``) and every entry that is not a tensor, and a pickle
can run any code. Here the index may name only classes that describe tensors, and entries are tensors or plain values.
"""

from __future__ import annotations

import io
import pickle  # noqa: TID251 (for an unpickler that refuses all but a list of names)
import pickletools
import zipfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint._traverse import set_element
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict, load

State = dict[str, Any]
"""A state dict of nested dicts, lists, tensors and plain values."""

META = "meta.pt"
"""Lightning's name for the file with everything that is not sharded. It is written last, so it marks a whole folder."""
INDEX = ".metadata"
"""PyTorch's name for the index of a folder: which entry has which shape, and where its bytes are."""
_INDEX_BYTES = 2**30
_LONGEST_LIST = 10_000
_METADATA, _FILES = "torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem"
_NAMES = {
    *((_METADATA, name) for name in ("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties")),
    *((_METADATA, name) for name in ("TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata")),
    (_METADATA, "_MEM_FORMAT_ENCODING"),
    (_FILES, "_StorageInfo"),
    ("torch.serialization", "_get_layout"),  # looks a name up in a table
    ("torch", "Size"),
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),  # where Python 3.13 has it
}
"""All that an index may name, in addition to the dtypes of torch."""


class _Index(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> object:
        dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        # A dotted name is looked up attribute by attribute, and would lead out of an allowed module.
        if dtype or (module, name) in _NAMES:
            return super().find_class(module, name)
        raise ValueError(f"unexpected {module}.{name}")


class _Reader(FileSystemReader):
    """PyTorch's reader, with an index that is checked."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.folder = folder

    def read_metadata(self, *args: object, **kwargs: object) -> Metadata:
        return read_index(self.folder)


class _PlainPlanner(DefaultLoadPlanner):
    """PyTorch's planner, but entries that are not tensors are loaded only as plain values."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        name = read_item.dest_index.fqn
        try:
            plain = torch.load(value, weights_only=True)  # noqa: TID251 (no code is run)
        except Exception as error:  # torch raises several kinds
            raise ValueError(f"{name}: expected a tensor or plain values, found something else") from error
        set_element(self.original_state_dict, self.mappings[name], plain)


class _WholePlanner(_PlainPlanner, _EmptyStateDictLoadPlanner):
    """Loads all entries, or those below some keys, into an empty state."""


def read_meta(folder: Path) -> State:
    """Return all of a sharded checkpoint that is not sharded."""
    meta: State = torch.load(folder / META, map_location="cpu", weights_only=True)  # noqa: TID251 (no code is run)
    return meta


def check_sharded(folder: Path, key: str = "resume") -> Path:
    """Return the folder if it is a complete sharded checkpoint. Raises ``ValueError`` that names ``key`` otherwise."""
    if not (folder / INDEX).is_file() or not zipfile.is_zipfile(folder / META):
        raise ValueError(f"{key}: expected a checkpoint, found the folder {folder}, which is not one or is incomplete")
    try:
        read_index(folder)
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from error
    return folder


def read_index(folder: Path) -> Metadata:
    """Read and check the index of a sharded checkpoint.

    Raises:
        ValueError: it is damaged, names anything that does not describe tensors, or entries that the folder cannot
            hold.
    """
    file = folder / INDEX
    try:
        if file.stat().st_size > _INDEX_BYTES:
            raise ValueError(f"it is larger than {_INDEX_BYTES:,} bytes")
        data = file.read_bytes()
        _check_numbers(data)
        index = _Index(io.BytesIO(data)).load()
        _check(index, sum(path.stat().st_size for path in folder.iterdir() if path.is_file()))
    except Exception as error:  # whatever a damaged pickle raises
        raise ValueError(f"{file} is damaged or something else: {error}") from error
    checked: Metadata = index
    checked.storage_meta = StorageMeta()
    return checked


def load_entries(state: State, folder: Path) -> None:
    """Load the entries of a state into its tensors, each rank its own shards. All ranks call this together.

    Raises:
        ValueError: an entry is neither a tensor nor plain values, or the folder is damaged.
    """
    with _failures_as_values(folder):
        load(state, storage_reader=_Reader(folder), planner=_PlainPlanner())


def read_entries(folder: Path, keys: Collection[str] | None = None) -> State:
    """Load whole entries into this process's memory, all of them or those below some keys; see :func:`load_entries`."""
    state: State = {}
    planner = _WholePlanner(None if keys is None else set(keys))  # type: ignore[no-untyped-call]
    with _failures_as_values(folder):
        _load_state_dict(state, _Reader(folder), planner=planner, no_dist=True)
    return state


@contextmanager
def _failures_as_values(folder: Path) -> Iterator[None]:
    try:
        yield
    except CheckpointException as error:
        # The message of PyTorch's error is the traceback of each rank.
        first, _ = next(iter(error.failures.values()))
        raise ValueError(f"{folder}: {first}") from error
    except (OSError, EOFError, KeyError, RuntimeError, AssertionError) as error:
        raise ValueError(f"{folder} is damaged: {error}") from error


def _check_numbers(data: bytes) -> None:
    # A pickle numbers its objects. Python makes a table as long as the highest number, which may be 2**32.
    for opcode, argument, _ in pickletools.genops(data):
        if "PUT" in opcode.name and isinstance(argument, int) and argument > len(data):
            raise ValueError(f"expected at most {len(data):,} objects, as it has bytes, found the number {argument:,}")


def _check(index: object, size: int) -> None:
    """Raise ``ValueError`` unless an index has the types that PyTorch writes, and no more than ``size`` bytes."""
    if not isinstance(index, Metadata):
        raise ValueError(f"expected PyTorch's Metadata, found {type(index).__name__}")
    entries, paths, files = index.state_dict_metadata, index.planner_data, index.storage_data
    total = 0
    for name, entry in entries.items():
        if type(entry) is TensorStorageMetadata and type(entry.size) is torch.Size:
            total += entry.size.numel() * entry.properties.dtype.itemsize
        elif type(entry) is not BytesStorageMetadata or type(name) is not str:
            raise ValueError(f"{name!r}: expected a tensor or bytes, found {type(entry).__name__}")
    if total > size:  # else memory would be taken for tensors that are not there
        raise ValueError(f"expected tensors of up to {size:,} bytes, as the files have, found {total:,}")
    for name, path in paths.items():
        # An integer is a place in a list, which is made as long as the largest one.
        if not all(type(part) is str or (type(part) is int and 0 <= part < _LONGEST_LIST) for part in path):
            raise ValueError(f"{name!r}: expected names and small numbers as its path, found {path!r}")
    for place, info in files.items():
        if type(place) is not MetadataIndex or type(info) is not _StorageInfo:
            raise ValueError(f"expected places in files, found {type(info).__name__}")
        if Path(info.relative_path).name != info.relative_path or info.transform_descriptors:
            raise ValueError(f"{place.fqn}: expected a file of the folder, found {info.relative_path!r}")
