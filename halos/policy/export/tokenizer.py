"""Writes a tokenizer so that transformers 4 and other programs can also read it."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from halos.data.rows.templates import with_control, without_control, without_date
from halos.files import remove
from halos.policy.export.base_model import NAMED_TEMPLATES, copy_files

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Template = str | dict[str, str] | None
"""A chat template, or several by name."""


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path, base_files: Mapping[str, Path]) -> None:
    """Write the tokenizer into a model's folder.

    If the base's own files give the same tokens, they are copied, with another chat template only where the tokenizer
    has one. Otherwise the tokenizer is written anew. Either way transformers 4 can read it.

    Args:
        tokenizer: the tokenizer.
        folder: the model's folder.
        base_files: the base's files by their names in the folder.
    """
    copy_files(base_files, folder)
    base = _load(folder) if base_files else None
    if base is None or not _same_tokens(base, tokenizer):
        for name in base_files:
            remove(folder / Path(name).parts[0])
        tokenizer.save_pretrained(folder)
    elif base.chat_template != tokenizer.chat_template:
        _write_template(folder, tokenizer.chat_template)
    _write_for_older(folder / "tokenizer_config.json")


def conditioned(tokenizer: PreTrainedTokenizerBase, control: str) -> PreTrainedTokenizerBase:
    """Return a copy of the tokenizer whose generation prompt ends with the control token exactly once.

    A template that was fixed to the date of the run writes today's date again.
    """
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = without_date(with_control(tokenizer.chat_template, control))
    return tokenizer


def unconditioned(tokenizer: PreTrainedTokenizerBase, control: str) -> None:
    """Remove the control token from the end of chat templates that :func:`conditioned` extended, in place."""
    tokenizer.chat_template = without_control(tokenizer.chat_template, control)


def _load(folder: Path) -> PreTrainedTokenizerBase | None:
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception:  # the base's files may need others of its files; the tokenizer is then written anew
        return None
    return tokenizer


def _same_tokens(base: PreTrainedTokenizerBase, tokenizer: PreTrainedTokenizerBase) -> bool:
    base_special, tokenizer_special = base.special_tokens_map, dict(tokenizer.special_tokens_map)
    # ModelSpec.tokenizer sets a missing padding token, which no training text has.
    if "pad_token" not in base_special and tokenizer_special.get("pad_token") == tokenizer_special.get("eos_token"):
        tokenizer_special.pop("pad_token", None)
    return base_special == tokenizer_special and _tokens(base) == _tokens(tokenizer)


def _tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[object, ...]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    state = tokenizer.get_vocab() if backend is None else backend.to_str()
    return type(tokenizer), state, tokenizer.split_special_tokens, str(tokenizer.added_tokens_decoder)


def _write_template(folder: Path, template: Template) -> None:
    # transformers writes templates to files of their own. Programs that do not read those read the tokenizer's config.
    for name in ("chat_template.json", "chat_template.jinja", NAMED_TEMPLATES):
        remove(folder / name)
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    config.pop("chat_template", None)
    if template is not None:
        named = {"default": template} if isinstance(template, str) else template
        listed = [{"name": name, "template": text} for name, text in named.items()]
        config["chat_template"] = template if isinstance(template, str) else listed
        for name, text in named.items():
            place = folder / ("chat_template.jinja" if name == "default" else f"{NAMED_TEMPLATES}/{name}.jinja")
            place.parent.mkdir(exist_ok=True)
            place.write_text(text, encoding="utf-8")
    file.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_for_older(file: Path) -> None:
    # transformers 4 does not know the class of transformers 5, and reads a list of special tokens under another key.
    config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    before = dict(config)
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(config.get("extra_special_tokens"), list):
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    if config != before:
        file.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
