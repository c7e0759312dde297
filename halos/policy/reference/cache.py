"""Reference log-probs on disk: by model, prompt and completion, so that all runs that ask the same share them.

    FOLDER/reference/<model>/<part>.safetensors

The model's key covers its weights, its config and the precision; an entry's key covers the token ids of the prompt and
of the completion, and thereby tokenizer, chat template, truncation and data. A part holds the entries that one run
added; it is written beside its place and moved there whole.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from halos.data.batches.reference_table import KEY_BYTES
from halos.files import atomic_file
from halos.policy.adapters import effective_state
from halos.processes.collectives import full_tensor

log = logging.getLogger(__name__)

FORMAT = "2"
"""Changes whenever the meaning of a file or the way to compute its numbers does."""
NOT_THE_MODEL = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache", "architectures")
"""Keys of a config that change no log-prob (the weights' own dtype is part of them)."""


def model_key(model: Any, precision: str) -> str:
    """The key of a model's log-probs: its weights to the bit, its config, and the precision it computes in.

    All ranks have to ask for that of a sharded model, which is put together one tensor at a time.
    """
    digest = hashlib.sha256()
    config = {name: value for name, value in model.config.to_dict().items() if name not in NOT_THE_MODEL}
    digest.update(json.dumps([FORMAT, precision, type(model).__name__, config], sort_keys=True, default=str).encode())
    for name, tensor in effective_state(model).items():
        values = full_tensor(tensor.detach()).cpu().contiguous()
        digest.update(f"{name} {values.dtype} {tuple(values.shape)}".encode())
        digest.update(_bytes(values))
    return digest.hexdigest()


class ReferenceCache:
    """The stored log-probs of one model.

    Args:
        folder: the cache's root; what has not been stored there is computed and added.
        model: the key from :func:`model_key`.
    """

    def __init__(self, folder: Path, model: str) -> None:
        self.folder, self.model = folder / "reference" / model[:32], model

    def read(self) -> dict[bytes, Tensor]:
        """All entries; a part that is cut off, altered or another model's is refused, with a message, and removed."""
        entries: dict[bytes, Tensor] = {}
        for path in sorted(self.folder.glob("*.safetensors")):
            try:
                entries |= self.read_part(path)
            except (ValueError, KeyError, OSError, SafetensorError) as error:
                log.warning("cached reference log-probs in %s are refused and made anew: %s", path, error)
                with suppress(OSError):  # where others may only read, it is refused again
                    path.unlink()
        return entries

    def write(self, entries: Mapping[bytes, Tensor]) -> Path | None:
        """Add a part with these entries, which appears whole or not at all; None, with a message, if it cannot be."""
        keys = sorted(entries)
        tensors = {
            "keys": torch.frombuffer(bytearray(b"".join(keys)), dtype=torch.uint8).view(-1, KEY_BYTES),
            "lengths": torch.tensor([len(entries[key]) for key in keys]),
            "logprobs": torch.cat([entries[key] for key in keys]).float(),
        }
        name = hashlib.sha256(b"".join(keys)).hexdigest()[:16]
        path = self.folder / f"{name}.safetensors"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with atomic_file(path, shared=True) as part:
                save_file(tensors, part, {"format": FORMAT, "model": self.model, "checksum": _checksum(tensors)})
        except (OSError, SafetensorError) as error:  # safetensors has its own error for a full disk
            log.warning("reference log-probs could not be kept in %s (cache_dir): %s", self.folder, error)
            return None
        return path

    def read_part(self, path: Path) -> dict[bytes, Tensor]:
        """The entries of a part; their numbers stay in the file, whose pages the system reads and drops as it likes.

        Raises ``ValueError`` and what safetensors raises for a part that is cut off, altered or another model's.
        """
        with safe_open(path, framework="pt") as file:
            told = file.metadata() or {}
            if (told.get("format"), told.get("model")) != (FORMAT, self.model):
                raise ValueError("it is of another model or version")
            tensors = {name: file.get_tensor(name) for name in ("keys", "lengths")}
        tensors["logprobs"] = _mapped(path, "logprobs")
        if told.get("checksum") != _checksum(tensors):
            raise ValueError("its checksum does not fit")
        keys = tensors["keys"].numpy().tobytes()
        parts = tensors["logprobs"].split(tensors["lengths"].tolist())
        return {keys[n * KEY_BYTES : (n + 1) * KEY_BYTES]: part for n, part in enumerate(parts)}


def _mapped(path: Path, name: str) -> Tensor:
    """A float32 tensor of a safetensors file, memory-mapped: safetensors itself copies what it reads."""
    with path.open("rb") as stream:
        header = int.from_bytes(stream.read(8), "little")
        told = json.loads(stream.read(header))[name]
    start, stop = told["data_offsets"]
    if told["dtype"] != "F32":
        raise ValueError(f"its {name} are {told['dtype']}")
    count = (stop - start) // 4
    # Copy-on-write, as torch wants memory that could be written to; nothing is.
    values = np.memmap(path, np.float32, "c", offset=8 + header + start, shape=(count,)) if count else np.zeros(0, "f4")
    return torch.from_numpy(values)


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name} {tuple(tensors[name].shape)}".encode())
        digest.update(_bytes(tensors[name]))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> Any:
    # NumPy has no bf16, and needs no copy.
    return tensor.contiguous().flatten().view(torch.uint8).numpy()
