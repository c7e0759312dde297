"""A cache of reference log-probs on disk, shared by all runs with the same model and the same tokens.

    FOLDER/reference/<model>/<part>.safetensors

The model's key covers its weights, its config and the precision. An entry's key covers the token ids of the prompt and
of the completion, and thereby tokenizer, chat template, truncation and data. A part contains the entries that one run
added. It is written under another name and then renamed, so that no reader sees half a part.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from halos.data.batches.reference_table import KEY_BYTES
from halos.policy.adapters import effective_state
from halos.processes.collectives import full_tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

FORMAT = "2"
"""Version of the files' meaning and of the way their numbers are computed; part of the model's key."""
NOT_THE_MODEL = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache", "architectures")
"""Keys of a config that change no log-prob. The dtype is hashed with each weight."""


def model_key(model: PreTrainedModel, precision: str) -> str:
    """Return the key of a model's log-probs: a hash of its weights to the bit, its config and the precision.

    A sharded model is gathered one tensor at a time, for which all ranks must call this function together.
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
    """The cached log-probs of one model.

    Args:
        folder: root of the cache, for all models.
        model: the model's key from :func:`model_key`.
    """

    def __init__(self, folder: Path, model: str) -> None:
        self.folder, self.model = folder / "reference" / model[:32], model

    def read(self) -> dict[bytes, Tensor]:
        """Return all entries. A part that is damaged or of another model is removed with a warning."""
        entries: dict[bytes, Tensor] = {}
        for path in sorted(self.folder.glob("*.safetensors")):
            try:
                entries |= self.read_part(path)
            except (ValueError, KeyError, OSError, SafetensorError) as error:
                log.warning("cached reference log-probs in %s are refused and computed again: %s", path, error)
                with suppress(OSError):  # in a folder that is read-only here it is refused at each start
                    path.unlink()
        return entries

    def write(self, entries: Mapping[bytes, Tensor]) -> Path | None:
        """Add a part with these entries. Returns its file, or None with a warning if it could not be written."""
        keys = sorted(entries)
        tensors = {
            "keys": torch.frombuffer(bytearray(b"".join(keys)), dtype=torch.uint8).view(-1, KEY_BYTES),
            "lengths": torch.tensor([len(entries[key]) for key in keys]),
            "logprobs": torch.cat([entries[key] for key in keys]).float(),
        }
        name = hashlib.sha256(b"".join(keys)).hexdigest()[:16]
        part = self.folder / f".{name}.{os.getpid()}.part"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            save_file(tensors, part, {"format": FORMAT, "model": self.model, "checksum": _checksum(tensors)})
            whole = part.replace(self.folder / f"{name}.safetensors")
        except (OSError, SafetensorError) as error:  # safetensors has its own error for a full disk
            log.warning("reference log-probs could not be kept in %s (cache_dir): %s", self.folder, error)
            part.unlink(missing_ok=True)
            return None
        return whole

    def read_part(self, path: Path) -> dict[bytes, Tensor]:
        """Return the entries of a part, memory-mapped: the system reads and drops the file's pages as it needs.

        Raises:
            ValueError: the part is of another model or version, or its checksum does not fit. A part that is cut off
                raises safetensors' own error.
        """
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if (metadata.get("format"), metadata.get("model")) != (FORMAT, self.model):
                raise ValueError("it is of another model or version")
            tensors = {name: file.get_tensor(name) for name in ("keys", "lengths")}
        tensors["logprobs"] = _mapped(path, "logprobs")
        if metadata.get("checksum") != _checksum(tensors):
            raise ValueError("its checksum does not fit")
        keys = tensors["keys"].numpy().tobytes()
        entries = tensors["logprobs"].split(tensors["lengths"].tolist())
        return {keys[n * KEY_BYTES : (n + 1) * KEY_BYTES]: entry for n, entry in enumerate(entries)}


def _mapped(path: Path, name: str) -> Tensor:
    # safetensors copies what it reads. All log-probs of a large data set would then be in memory.
    with path.open("rb") as stream:
        header_size = int.from_bytes(stream.read(8), "little")
        tensor_info = json.loads(stream.read(header_size))[name]
    start, stop = tensor_info["data_offsets"]
    if tensor_info["dtype"] != "F32":
        raise ValueError(f"its {name} are {tensor_info['dtype']}")
    count, offset = (stop - start) // 4, 8 + header_size + start
    # Copy-on-write: torch warns of read-only memory. Nothing writes to it. An empty file cannot be mapped.
    values = np.memmap(path, np.float32, "c", offset=offset, shape=(count,)) if count else np.zeros(0, "f4")
    return torch.from_numpy(values)


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name} {tuple(tensors[name].shape)}".encode())
        digest.update(_bytes(tensors[name]))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> memoryview:
    # Through uint8, as NumPy has no bfloat16. hashlib reads the tensor's memory without a copy.
    return tensor.contiguous().flatten().view(torch.uint8).numpy().data
