"""Exported tokenizers: the base's own files where they can be kept, and readable by older programs where not."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from halos.policy.construction import add_control_tokens
from halos.policy.export.tokenizer import conditioned, save_tokenizer, unconditioned
from halos.policy.loading import ModelSpec
from tests import tiny

TURNS = [{"role": "user", "content": "hello"}]
NAMED = {"default": tiny.CHATML, "tool_use": tiny.WITH_EOT}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A base as transformers 4 wrote it: its class, its keys, its template inside the tokenizer's config."""
    folder = tiny.save(tmp_path / "base")
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text())
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    config["additional_special_tokens"] = config.pop("extra_special_tokens")
    config["chat_template"] = (folder / "chat_template.jinja").read_text()
    config["of_the_base"] = "kept"
    (folder / "chat_template.jinja").unlink()
    del config["pad_token"]
    file.write_text(json.dumps(config))
    return folder


def save(tokenizer: Any, base: Path | None, folder: Path) -> Any:
    folder.mkdir()
    files = {} if base is None else ModelSpec(path=str(base)).base().tokenizer_files
    save_tokenizer(tokenizer, folder, files)
    return AutoTokenizer.from_pretrained(folder)


def texts(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}


def test_an_unchanged_tokenizer_is_exported_as_the_base_has_it(base: Path, tmp_path: Path) -> None:
    save(ModelSpec(path=str(base)).tokenizer(), base, tmp_path / "out")
    names = ("tokenizer.json", "tokenizer_config.json")
    assert texts(tmp_path / "out") == {name: (base / name).read_bytes() for name in names}


def test_another_template_is_all_that_changes(base: Path, tmp_path: Path) -> None:
    tokenizer = ModelSpec(path=str(base), chat_template=tiny.WITH_EOT).tokenizer()
    loaded = save(tokenizer, base, tmp_path / "out")
    assert loaded.chat_template == tiny.WITH_EOT
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    before, after = (json.loads((folder / "tokenizer_config.json").read_text()) for folder in (base, tmp_path / "out"))
    assert after == {**before, "chat_template": tiny.WITH_EOT}


@pytest.mark.parametrize("named", [False, True])
def test_no_older_template_of_the_base_is_left(named: bool, base: Path, tmp_path: Path) -> None:
    (base / "chat_template.json").write_text(json.dumps({"chat_template": "old"}))
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "rag.jinja").write_text("old")
    tokenizer = ModelSpec(path=str(base)).tokenizer()
    tokenizer.chat_template = NAMED if named else tiny.WITH_EOT
    loaded = save(tokenizer, base, tmp_path / "out")
    assert loaded.chat_template == tokenizer.chat_template
    assert not (tmp_path / "out" / "chat_template.json").exists()
    assert not (tmp_path / "out" / "additional_chat_templates" / "rag.jinja").exists()


@pytest.mark.parametrize("of_base", [False, True])
def test_a_base_that_only_transformers_5_reads_is_exported_for_both(of_base: bool, tmp_path: Path) -> None:
    base = tiny.save(tmp_path / "base")
    before = json.loads((base / "tokenizer_config.json").read_text())
    assert before["tokenizer_class"] == "TokenizersBackend"
    tokenizer = ModelSpec(path=str(base)).tokenizer()
    loaded = save(tokenizer, base if of_base else None, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert config["additional_special_tokens"] == before["extra_special_tokens"]
    assert loaded.added_tokens_decoder == tokenizer.added_tokens_decoder
    assert loaded.special_tokens_map == tokenizer.special_tokens_map


@pytest.mark.parametrize("of_base", [False, True])
def test_a_tokenizer_with_more_tokens_is_written_so_that_transformers_4_reads_it(
    of_base: bool, base: Path, tmp_path: Path
) -> None:
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "rag.jinja").write_text("old")
    tokenizer = tiny.word_tokenizer(tiny.CHATML)
    add_control_tokens(tokenizer, ["<|new|>"])
    loaded = save(tokenizer, base if of_base else None, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    # transformers 4 expects a dictionary under this key.
    assert not isinstance(config.get("extra_special_tokens"), list)
    assert not (tmp_path / "out" / "additional_chat_templates").exists()
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert loaded.chat_template == tokenizer.chat_template
    assert loaded("hello<|new|>")["input_ids"] == tokenizer("hello<|new|>")["input_ids"]
    assert set(loaded.all_special_ids) == set(tokenizer.all_special_ids)


def test_a_base_whose_tokenizer_cannot_be_read_alone_is_written_anew(base: Path, tmp_path: Path) -> None:
    tokenizer = ModelSpec(path=str(base)).tokenizer()
    (base / "tokenizer.json").unlink()
    assert save(tokenizer, base, tmp_path / "out").get_vocab() == tokenizer.get_vocab()


def test_each_of_several_templates_is_conditioned_once(tmp_path: Path) -> None:
    tokenizer = tiny.word_tokenizer()
    tokenizer.chat_template = NAMED
    twice = save(conditioned(conditioned(tokenizer, tiny.GOOD), tiny.GOOD), None, tmp_path / "out")
    for name in NAMED:
        plain = tokenizer.apply_chat_template(TURNS, chat_template=name, add_generation_prompt=True, tokenize=False)
        text = twice.apply_chat_template(TURNS, chat_template=name, add_generation_prompt=True, tokenize=False)
        assert text == f"{plain}{tiny.GOOD}"
    unconditioned(twice, tiny.GOOD)
    assert twice.chat_template == tokenizer.chat_template == NAMED


def test_an_export_of_an_export_has_the_same_files(base: Path, tmp_path: Path) -> None:
    save(tiny.word_tokenizer(tiny.CHATML, pad=tiny.PAD), base, tmp_path / "one")
    for file in ("config.json", "model.safetensors"):
        shutil.copy(base / file, tmp_path / "one" / file)
    save(ModelSpec(path=str(tmp_path / "one")).tokenizer(), tmp_path / "one", tmp_path / "two")
    assert texts(tmp_path / "two").items() <= texts(tmp_path / "one").items()
