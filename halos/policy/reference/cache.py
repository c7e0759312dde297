"""A cache of reference log-probs on disk, shared by all runs with the same model and the same tokens.

    FOLDER/reference/<model>/<part>.safetensors

The model's key covers its weights, its config and the precision. An entry's key covers the token ids of the prompt and
of the completion. So tokenizer, chat template, truncation and data need no key. A part contains entries that one run
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

from halos.caches import PRIVATE, Refused, Seals
from halos.data.batches.reference_entries import KEY_BYTES, Entries, GrowingEntries
from halos.files import atomic_file
from halos.policy.adapters import effective_state
from halos.processes.collectives import full_tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

FORMAT = "2"
"""Version of the file format and of the computation of the numbers; part of the model's key."""
NOT_THE_MODEL = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache", "architectures")
"""Keys of a config that change no log-prob. The dtype is hashed with each weight."""

UNREADABLE = (ValueError, KeyError, OSError, SafetensorError)
"""Errors of reading a part that is damaged or may not be used."""


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
        seals: which parts may be used.
    """

    def __init__(self, folder: Path, model: str, seals: Seals = PRIVATE) -> None:
        self.root, self.model, self.seals = folder, model, seals
        self.folder = folder / "reference" / model[:32]

    def read(self) -> Entries:
        """Return all entries of parts that may be used.

        In a private cache, a part that this user wrote is removed with a warning if it is damaged or of another model.
        """
        return self.read_with_seals()[0]

    def read_with_seals(self) -> tuple[Entries, list[str]]:
        """Return the result of :meth:`read`, and the seals of the parts. A seal covers all numbers of its part."""
        entries, seals = GrowingEntries(self.root), list[str]()
        for path in sorted(self.folder.glob("*.safetensors")):
            try:
                part, seal = self._read_sealed(path)
                entries.add(part)
                seals.append(seal)
            except UNREADABLE as error:
                level = logging.WARNING if self.seals.private else logging.INFO
                log.log(level, "cached reference log-probs in %s are refused and computed again: %s", path, error)
                with suppress(OSError):  # in a read-only folder the part stays, and is refused at each start
                    if self.seals.private and not isinstance(error, Refused) and path.stat().st_uid == os.geteuid():
                        path.unlink()
        return entries.joined(), seals

    def write(self, entries: Mapping[bytes, Tensor]) -> Path | None:
        """Add a part with these entries. Returns its file, or None with a warning if it could not be written."""
        keys = sorted(entries)
        tensors = {
            "keys": torch.frombuffer(bytearray(b"".join(keys)), dtype=torch.uint8).view(-1, KEY_BYTES),
            "lengths": torch.tensor([len(entries[key]) for key in keys]),
            "logprobs": torch.cat([entries[key] for key in keys]).float(),
        }
        name = hashlib.sha256(b"".join(keys)).hexdigest()[:16]
        if not self.seals.private:  # so that no user's part replaces another user's
            name += f"{self.seals.suffix}-{os.geteuid()}"
        path = self.folder / f"{name}.safetensors"
        metadata = {"format": FORMAT, "model": self.model, "checksum": self.seals.seal(self._sealed_text(tensors))}
        try:
            self.seals.check_owner(self.seals.make_folder(self.root, "reference", self.folder.name))
            with atomic_file(path, shared=True, private=self.seals.private) as part:
                save_file(tensors, part, metadata)
        except (OSError, SafetensorError, Refused) as error:  # safetensors has its own error for a full disk
            log.warning("reference log-probs could not be kept in %s (cache_dir): %s", self.folder, error)
            return None
        return path

    def read_part(self, path: Path) -> Entries:
        """Return the entries of a part, memory-mapped: the system reads and drops pages of the file as needed.

        Raises:
            ValueError: the part is of another model or version, its checksum does not fit, or another user could have
                written it. A part that is cut off raises safetensors' own error.
        """
        return self._read_sealed(path)[0]

    def _read_sealed(self, path: Path) -> tuple[Entries, str]:
        self.seals.check_owner(path.parent.parent, path.parent, path)
        with safe_open(path, framework="pt") as file:
            metadata: Mapping[str, str] = file.metadata() or {}
            if (metadata.get("format"), metadata.get("model")) != (FORMAT, self.model):
                raise ValueError("it is of another model or version")
            tensors = {name: file.get_tensor(name) for name in ("keys", "lengths")}
        tensors["logprobs"] = _mapped(path, "logprobs")
        self.seals.check(metadata.get("checksum"), self._sealed_text(tensors))
        if int(tensors["lengths"].sum()) != len(tensors["logprobs"]):
            raise ValueError("its lengths are not those of its log-probs")
        entries = Entries.of(tensors["keys"].numpy(), tensors["lengths"].numpy(), tensors["logprobs"])
        return entries, metadata["checksum"]

    def _sealed_text(self, tensors: Mapping[str, Tensor]) -> str:
        return f"{FORMAT} {self.model} {_checksum(tensors)}"


def _mapped(path: Path, name: str) -> Tensor:
    # safetensors copies what it reads, so all log-probs of a large data set would be in memory.
    with path.open("rb") as stream:
        header_size = int.from_bytes(stream.read(8), "little")
        tensor_info = json.loads(stream.read(header_size))[name]
    start, stop = tensor_info["data_offsets"]
    if tensor_info["dtype"] != "F32":
        raise ValueError(f"its {name} are {tensor_info['dtype']}")
    count, offset = (stop - start) // 4, 8 + header_size + start
    # Copy-on-write, because torch warns of read-only memory. Nothing is written. An empty array cannot be mapped.
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
