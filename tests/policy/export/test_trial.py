"""The dry export finds before training what would fail after it."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from halos.policy.loading import ModelSpec
from tests import tiny


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny.save(tmp_path / "base")


def try_export(folder: Path, tokenizer: Any = None, **options: Any) -> None:
    spec = ModelSpec(path=str(folder))
    spec.try_export(tokenizer or spec.tokenizer(), spec.base(), end_of_turn=5, **options)


def test_a_good_base_passes_without_a_word(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        try_export(folder, control=tiny.GOOD)
    assert caplog.text == ""


def test_settings_without_effect_are_counted_and_named(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "generation_config.json").write_text(json.dumps({"do_sample": False, "temperature": 0.9, "top_p": 0.5}))
    with caplog.at_level(logging.WARNING):
        try_export(folder)
    assert "has 2 settings without effect" in caplog.text
    assert "temperature=0.9, top_p=0.5" in caplog.text


def test_a_generation_config_that_cannot_be_mended_is_refused(folder: Path) -> None:
    (folder / "generation_config.json").write_text(json.dumps({"num_return_sequences": 3}))
    with pytest.raises(ValueError, match=r"^model\.path: .*num_return_sequences"):
        try_export(folder)


def test_a_tokenizer_that_would_be_another_one_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = ModelSpec(path=str(folder)).tokenizer()
    other = tiny.bpe_tokenizer(tiny.CHATML)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *_, **__: other)
    with pytest.raises(ValueError, match=r"^model\.path: the tokenizer that would be exported differs"):
        try_export(folder, tokenizer)


def test_what_cannot_be_written_is_a_value_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tiny.bpe_tokenizer()
    monkeypatch.setattr(type(tokenizer), "save_pretrained", lambda *_, **__: 1 / 0)
    with pytest.raises(ValueError, match=r"^model\.path: the trained model could not be exported: division by zero"):
        try_export(folder, tokenizer)


def test_a_gguf_file_passes(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    file = tiny.save_gguf(tmp_path / "model.gguf", tiny.model("llama", vocab_size=300))
    try_export(file)


def test_a_model_without_weights_has_the_generation_config_of_the_base_and_no_more(folder: Path) -> None:
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 5], "max_new_tokens": 9}))
    spec = ModelSpec(path=str(folder))
    generation, loaded = spec.skeleton().generation_config, spec.load().generation_config
    assert generation.to_dict() == loaded.to_dict()
    assert "trust_remote_code" not in generation.to_dict()
