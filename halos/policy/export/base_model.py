"""What an export takes over from the base model: its small files, and the precision of its weights."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "tekken.json",
    "chat_template.jinja", "chat_template.json",
)  # fmt: skip
PROCESSOR_FILES = (
    "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json",
)  # fmt: skip
"""How a multimodal model's images and sounds are prepared; transformers' AutoProcessor reads them."""
NAMED_TEMPLATES = "additional_chat_templates"
"""Folder of the chat templates other than the default one."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_SAFETENSORS = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseModel:
    """What an export takes over from the base model.

    Attributes:
        tokenizer_files, processor_files: the base's files by their names inside a model folder.
        dtype: precision of the exported weights. None: that of the weights as they were trained.
    """

    tokenizer_files: Mapping[str, Path] = field(default_factory=dict)
    processor_files: Mapping[str, Path] = field(default_factory=dict)
    dtype: torch.dtype | None = None


NO_BASE = BaseModel()
"""Nothing is taken over: weights keep their precision, and the tokenizer is written anew."""


def read_base(
    name: str | None, config: PretrainedConfig, dtype: str, trained: torch.dtype, revision: str | None = None
) -> BaseModel:
    """Find the files of a base model. Those of a hub id are downloaded if they are not in the cache.

    Args:
        name: a hub id or a folder. None: the base has no such files (GGUF).
        config: the base's config.
        dtype: the precision of the export: ``float32``, ``bfloat16``, or ``base`` for the base's own, but not wider
            than ``trained``.
        trained: the precision in which the weights are trained.
        revision: a commit, a tag or a branch of a hub id; None: the newest.
    """
    exported = DTYPES[dtype] if dtype != "base" else _stored_dtype(name, config)
    if dtype == "base" and exported is not None and exported.itemsize > trained.itemsize:
        exported = None
    if name is None:
        return BaseModel(dtype=exported)
    named = {f"{NAMED_TEMPLATES}/{file.name}": file for file in Path(name, NAMED_TEMPLATES).glob("*.jinja")}
    return BaseModel(
        tokenizer_files=_found(name, TOKENIZER_FILES, revision) | named,
        processor_files=_found(name, PROCESSOR_FILES, revision),
        dtype=exported,
    )


def _found(name: str, files: Iterable[str], revision: str | None) -> dict[str, Path]:
    from transformers.utils.hub import cached_file

    cached_paths = {
        file: cached_file(
            name,
            file,
            revision=revision,
            # None for a file that the hub lacks, or that cannot be downloaded now.
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        for file in files
    }
    return {file: Path(path) for file, path in cached_paths.items() if path is not None}


def _stored_dtype(name: str | None, config: PretrainedConfig) -> torch.dtype | None:
    stored = config.dtype or config.get_text_config().dtype
    if isinstance(stored, torch.dtype) and stored.is_floating_point:
        return stored
    weights = next(iter(sorted(Path(name).glob("*.safetensors"))), None) if name is not None else None
    if weights is None:
        return None
    with weights.open("rb") as stream:
        header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    return next((_SAFETENSORS[entry["dtype"]] for entry in header.values() if entry.get("dtype") in _SAFETENSORS), None)


def copy_files(files: Mapping[str, Path], folder: Path) -> None:
    """Copy files into the folder, under their names in it."""
    for name, file in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(file, folder / name)


def round_weights(model: PreTrainedModel, dtype: torch.dtype | None) -> None:
    """Convert the weights to the exported precision, one by one and in place, so that memory holds only one model.

    Weights that the architecture always keeps in float32 (such as a router's bias) stay as they are.
    """
    if dtype is None:
        return
    float32_patterns = [re.compile(pattern.replace("*", ".*")) for pattern in model._get_dtype_plan(dtype)]
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not any(pattern.search(name) for pattern in float32_patterns):
            parameter.data = parameter.data.to(dtype)
