"""Checks of model files and configs before any long work. They read only headers."""

from __future__ import annotations

import importlib.util
import json
import logging
import re
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from halos.files import in_home

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)

_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")


PACKAGED = "pkg://"
"""``pkg://halos.toy/reference`` is a directory inside an installed package."""


def locate(path: str) -> Path:
    """Return the local path that ``path`` stands for. If it is a hub id, nothing exists at this path."""
    if not path.startswith(PACKAGED):
        return in_home(path)
    package, _, folder = path.removeprefix(PACKAGED).partition("/")
    try:
        return Path(str(files(package))) / folder
    except ModuleNotFoundError as error:
        raise ValueError(f"model.path: no such package: {package} (of {path})") from error


def check_path(path: str, location: Path, *, weights: bool) -> None:
    """Check that a model can be loaded from ``path``, from the files at ``location`` (:func:`locate`) or as a hub id.

    Raises:
        ValueError: no such path, damaged, missing or unreadable files, or a missing package.
    """
    try:
        _check_files(path, location, weights=weights)
    except OSError as error:
        found = f"{error.filename or path} ({error.strerror or error})"
        raise ValueError(f"model.path: expected files that can be read, found {found}") from None


def _check_files(path: str, location: Path, *, weights: bool) -> None:
    if location.suffix == ".gguf":
        if any(importlib.util.find_spec(name) is None for name in ("gguf", "accelerate")):
            raise ValueError(f"model.path: {path} is a GGUF file; install the extra with pip install 'halos[gguf]'")
        check_gguf(location)
    elif location.is_dir():
        check_directory(location, weights=weights)
    elif location.exists():
        raise ValueError(f"model.path: expected a model directory or a .gguf file, found the file {path}")
    elif path.startswith((PACKAGED, "/", "./", "../", "~")) or path.count("/") > 1:
        raise ValueError(f"model.path: no such directory or file: {path}")
    elif "/" in path and location.parent.is_dir():
        # A misspelt local path would otherwise be downloaded as a hub id, or fail with an obscure error.
        why = f"it is not taken for a hub id, as {location.parent} is a folder here"
        raise ValueError(f"model.path: no such directory or file: {path}; {why}")


def check_directory(folder: Path, *, weights: bool = True, key: str = "model.path") -> None:
    """Check a model's directory.

    Args:
        folder: the directory.
        weights: also check that its safetensors files are there and complete.
        key: the configuration's key, for errors.

    Raises:
        ValueError: the config, the tokenizer or the weights are missing or damaged.
    """
    adapter = folder / "adapter_config.json"
    if adapter.is_file():
        raise ValueError(_adapter_error(adapter))
    if not (folder / "config.json").is_file():
        raise ValueError(f"{key}: expected a config.json in {folder}, found none")
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json")):
        raise ValueError(f"{key}: expected tokenizer files (tokenizer.json) in {folder}, found none")
    for file in folder.glob("*.json"):
        file.open("rb").close()  # transformers has many words for a file that cannot be read
    for file in weight_files(folder, key) if weights else ():
        if not file.is_file():
            raise ValueError(f"{key}: {folder} lacks {file.name}, which its index names")
        check_safetensors(file, key=key)


def _adapter_error(file: Path) -> str:
    try:
        base = json.loads(file.read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (ValueError, KeyError, TypeError, RecursionError):
        base = "its base"
    return (
        f"model.path: expected a whole model, found an adapter of {base} in {file.parent}; set model.path={base} "
        f"model.lora.enabled=true model.lora.path={file.parent}, or merge it into its base with peft"
    )


def weight_files(folder: Path, key: str = "model.path") -> list[Path]:
    """Return the safetensors files of a model's directory. Raises ``ValueError`` if there are none.

    If there are several files, the index says which belong to the model.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            return [folder / name for name in sorted(names)]
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
            raise ValueError(f"{key}: {index} is not an index of safetensors files: {error}") from error
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    hint = "to train from random weights set model.random_weights=true"
    if any((folder / name).is_file() for name in _PICKLES):
        hint = "pytorch_model.bin is a pickle, which halos does not load: convert it with save_pretrained"
    raise ValueError(f"{key}: expected weights (model.safetensors) in {folder}, found none; {hint}")


def check_safetensors(path: Path, *, key: str = "model.path") -> dict[str, Any]:
    """Return what the header of a safetensors file says about its tensors, by name.

    Raises:
        ValueError: the file's size differs from its header, or the header is invalid. The error names the key.
    """
    # A safetensors file is 8 bytes with the length of its header, the header as JSON, and the tensors' bytes.
    size = path.stat().st_size
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if not 2 <= length <= size - 8:
            raise ValueError(f"{key}: {path} is cut off or not a safetensors file ({size} bytes)")
        try:
            header = json.loads(stream.read(length))
            end = max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
            raise ValueError(f"{key}: {path} is not a safetensors file: {error}") from error
    if 8 + length + end != size:
        raise ValueError(f"{key}: {path} is cut off: expected {8 + length + end} bytes, found {size}")
    return dict(header)


def check_gguf(path: Path) -> None:
    """Raise ``ValueError`` unless the file is in GGUF format and contains all bytes of its tensors."""
    if not path.is_file():
        raise ValueError(f"model.path: no such file: {path}")
    with path.open("rb") as stream:
        magic = stream.read(4)
    if magic != b"GGUF":
        raise ValueError(f"model.path: expected {path} to begin with 'GGUF', found {magic!r}")
    from gguf import GGUFReader

    try:
        # The reader maps the file and slices every tensor from it, which fails if the file ends too early.
        tensors = len(GGUFReader(path).tensors)
    except (ValueError, IndexError, KeyError, OverflowError, UnicodeDecodeError) as error:
        raise ValueError(f"model.path: {path} is cut off or damaged: {error}") from error
    if not tensors:
        raise ValueError(f"model.path: {path} holds no tensors")


def check_markers(tokenizer: PreTrainedTokenizerBase, *, refuse: bool) -> None:
    """Check that the markers of a chat template, such as ``<|im_end|>``, are single tokens.

    A marker in pieces is ordinary text: the model has to learn it, and cannot end a turn with it.

    Args:
        tokenizer: the tokenizer with the template.
        refuse: raise an error. False: only warn, because a template may contain markers that it never writes.

    Raises:
        ValueError: markers are split.
    """
    markers = dict.fromkeys(re.findall(r"<\|\w+\|>", str(tokenizer.chat_template)))
    counts = {marker: len(tokenizer(marker, add_special_tokens=False)["input_ids"]) for marker in markers}
    split = ", ".join(f"{marker} into {count}" for marker, count in counts.items() if count > 1)
    if not split:
        return
    message = (
        f"model.chat_template: expected its markers to be single tokens, but this tokenizer splits {split} tokens; "
        "set model.chat_template=plain, or add the markers with tokenizer.add_special_tokens and save_pretrained"
    )
    if refuse:
        raise ValueError(message)
    log.warning("%s", message)


def check_encodes(tokenizer: PreTrainedTokenizerBase, path: str, key: str = "model.path") -> None:
    """Check that a loaded tokenizer encodes text, and that its ids are those of a vocabulary.

    Args:
        tokenizer: the tokenizer.
        path: where it was loaded from.
        key: the configuration's key, for errors.

    Raises:
        ValueError: settings have wrong types, or an id is so high that a copy of the tokenizer would fill the memory.
    """
    try:
        tokenizer("some text")
        ids = tokenizer.get_vocab().values()
    except Exception as error:  # transformers reads settings of any type from the files, and uses them here
        raise ValueError(f"{key}: the tokenizer of {path} encodes no text: {error!r}; save it anew") from error
    # Copying and exporting go through all ids up to the highest. Real vocabularies have only small gaps.
    if max(ids, default=0) > 10 * len(ids) + 1_000_000:
        found = f"found an id of {max(ids):,} with {len(ids):,} tokens"
        raise ValueError(f"{key}: expected the tokenizer of {path} to number its tokens, {found}")


def check_positions(model: PreTrainedModel, longest: int) -> None:
    """Check the longest row against the number of positions that the model was trained with.

    A model with computed positions (rotary) may go beyond that number with a warning.

    Args:
        model: the policy.
        longest: tokens of the longest row.

    Raises:
        ValueError: the model has a table of learned positions, which is shorter than the row.
    """
    trained = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if not trained or longest <= trained:
        return
    tokens = model.get_input_embeddings()
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding) and module is not tokens]
    # No attribute says that positions are learned. They are if there is an embedding with that many rows; OPT's has two
    # more.
    if any(trained <= table.num_embeddings <= trained + 2 for table in tables):
        learned = f"{trained}, the positions that {type(model).__name__} has learned"
        raise ValueError(f"data.max_length: expected at most {learned}, as the data have a row of {longest} tokens")
    log.warning(
        "data.max_length: the longest row has %d tokens, and %s was trained with at most %d (max_position_embeddings)",
        *(longest, type(model).__name__, trained),
    )


def warn_of_rotary(config: PretrainedConfig, longest: int) -> None:
    """Warn if rotary frequencies would depend on the longest row of a forward.

    Args:
        config: the text model's config.
        longest: the maximum number of tokens of a row (``data.max_length``).
    """
    parameters: dict[str, object] = getattr(config, "rope_parameters", None) or {}
    # Models with several kinds of layers have one dict for each kind.
    for rope in [parameters, *(value for value in parameters.values() if isinstance(value, dict))]:
        trained = rope.get("original_max_position_embeddings") or config.max_position_embeddings
        if rope.get("rope_type") in ("dynamic", "longrope") and longest > trained:
            log.warning(
                "data.max_length=%d: with rope_type=%s transformers changes the frequencies of all rows of a forward "
                "in which one has more than %d tokens; log-probs, a cached reference's too, then depend on which "
                "rows are computed together. Set data.max_length=%d or lower",
                *(longest, rope["rope_type"], trained, trained),
            )
