"""Damaged and incomplete model files are refused from their headers, before anything long starts."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from halos.policy.checks import (
    check_directory,
    check_gguf,
    check_path,
    check_positions,
    check_safetensors,
    warn_of_rotary,
)
from tests import tiny


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("model"))


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A whole model to damage."""
    return Path(shutil.copytree(saved, tmp_path / "model"))


@pytest.fixture(scope="module")
def whole_gguf(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    pytest.importorskip("gguf")
    model = tiny.model("llama", vocab_size=300)
    return tiny.save_gguf(tmp_path_factory.mktemp("gguf") / "whole.gguf", model).read_bytes()


def shard(folder: Path) -> list[Path]:
    """The model of the folder, saved again in several files."""
    tiny.save(folder, max_shard_size="10KB")
    (folder / "model.safetensors").unlink()
    return sorted(folder.glob("model-*.safetensors"))


# Directories


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_file_that_cannot_be_read_is_named(name: str, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Path.open

    def refuse(self: Path, *args: Any, **options: Any) -> Any:
        if self.name == name:
            raise PermissionError(13, "Permission denied", str(self))
        return real(self, *args, **options)

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(ValueError, match=rf"^model\.path: expected files that can be read, found .*{name} \(P"):
        check_path(str(saved), saved, weights=True)


def test_a_whole_directory_passes(saved: Path) -> None:
    check_directory(saved)


@pytest.mark.parametrize("weights", [True, False])
def test_a_config_is_needed(folder: Path, weights: bool) -> None:
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match=r"^model\.path: expected a config\.json in .*model, found none"):
        check_directory(folder, weights=weights)


@pytest.mark.parametrize("weights", [True, False])
def test_a_tokenizer_is_needed(folder: Path, weights: bool) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ValueError, match=r"expected tokenizer files \(tokenizer\.json\)"):
        check_directory(folder, weights=weights)


def test_weights_are_needed_unless_they_are_to_be_random(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    check_directory(folder, weights=False)
    with pytest.raises(ValueError, match=r"found none; .*random_weights=true"):
        check_directory(folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model.bin.index.json"])
def test_pickled_weights_are_refused(folder: Path, name: str) -> None:
    (folder / "model.safetensors").rename(folder / name)
    with pytest.raises(ValueError, match=r"pickle, which halos does not load: convert it with save_pretrained"):
        check_directory(folder)


def test_pickled_weights_beside_safetensors_do_no_harm(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"anything")
    check_directory(folder)


# Shards


def test_whole_shards_pass(folder: Path) -> None:
    assert len(shard(folder)) > 1
    check_directory(folder)


@pytest.mark.parametrize("which", [0, -1])
def test_a_missing_shard_is_named(folder: Path, which: int) -> None:
    missing = shard(folder)[which]
    missing.unlink()
    with pytest.raises(ValueError, match=rf"lacks {missing.name}, which its index names"):
        check_directory(folder)


def test_a_shard_that_is_cut_off_is_named(folder: Path) -> None:
    cut = shard(folder)[1]
    cut.write_bytes(cut.read_bytes()[:-1])
    with pytest.raises(ValueError, match=rf"{cut.name} is cut off"):
        check_directory(folder)


@pytest.mark.parametrize("index", ["", "{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": {}}}', "null"])
def test_an_index_that_is_none_is_refused(folder: Path, index: str) -> None:
    (folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ValueError, match=r"index\.json is not an index of safetensors files"):
        check_directory(folder)


# Safetensors


@pytest.mark.parametrize("kept", [0, 1, 7, 8, 9, 200, 0.5, 0.99, -100, -1])
def test_safetensors_that_are_cut_off_are_refused(folder: Path, kept: float) -> None:
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: int(kept * len(whole)) if isinstance(kept, float) else kept])
    with pytest.raises(ValueError, match=r"^model\.path: .*model\.safetensors is (cut off|not a safetensors file)"):
        check_directory(folder)


def test_the_size_that_is_missing_is_told(folder: Path) -> None:
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-3])
    with pytest.raises(ValueError, match=rf"expected {len(whole)} bytes, found {len(whole) - 3}"):
        check_safetensors(file)


def test_bytes_behind_the_last_tensor_are_refused(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes() + b"\0")
    with pytest.raises(ValueError, match="is cut off"):
        check_safetensors(file)


@pytest.mark.parametrize("header", [b"not json", b"[1, 2]", b'{"a": 1}', b'{"a": {"data_offsets": []}}', b"\xff\xfe"])
def test_a_header_that_is_none_is_refused(tmp_path: Path, header: bytes) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(ValueError, match=r"x\.safetensors is not a safetensors file"):
        check_safetensors(file)


@pytest.mark.parametrize("length", [0, 1, 10_000, 2**63, 2**64 - 1])
def test_a_header_of_impossible_length_is_refused(tmp_path: Path, length: int) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes(length.to_bytes(8, "little") + b"{}" * 50)
    with pytest.raises(ValueError, match=r"is cut off or not a safetensors file \(108 bytes\)"):
        check_safetensors(file)


def test_metadata_is_no_tensor(tmp_path: Path) -> None:
    header = json.dumps({"__metadata__": {"format": "pt"}}).encode()
    file = tmp_path / "x.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header)
    check_safetensors(file)


# GGUF


def test_a_whole_gguf_passes(whole_gguf: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(whole_gguf)
    check_gguf(tmp_path / "x.gguf")


@pytest.mark.parametrize("kept", [4, 8, 23, 24, 100, 0.02, 0.1, 0.2, 0.5, 0.9, -40, -1])
def test_a_gguf_that_is_cut_off_is_refused(whole_gguf: bytes, tmp_path: Path, kept: Any) -> None:
    file = tmp_path / "x.gguf"
    file.write_bytes(whole_gguf[: int(kept * len(whole_gguf)) if isinstance(kept, float) else kept])
    with pytest.raises(ValueError, match=r"^model\.path: .*x\.gguf is cut off or damaged"):
        check_gguf(file)


@pytest.mark.parametrize("content", [b"", b"GGU", b"PK\x03\x04 something else"])
def test_what_does_not_begin_as_a_gguf_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.gguf").write_bytes(content)
    with pytest.raises(ValueError, match="to begin with 'GGUF'"):
        check_gguf(tmp_path / "x.gguf")


def test_a_gguf_without_tensors_is_refused(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match="holds no tensors"):
        check_gguf(tmp_path / "x.gguf")


def test_a_gguf_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such file"):
        check_gguf(tmp_path / "x.gguf")


DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
LONG = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}


@pytest.mark.parametrize(
    ("rope", "longest", "warned"),
    [
        (DYNAMIC, 64, False),
        (DYNAMIC, 65, True),
        (LONG | {"rope_theta": 1e4, "original_max_position_embeddings": 16}, 17, True),
        (LONG | {"rope_theta": 1e4, "original_max_position_embeddings": 16}, 16, False),
        ({"rope_type": "default", "rope_theta": 1e4}, 65, False),
    ],
)
def test_frequencies_that_depend_on_the_longest_row_are_warned_of_where_rows_can_be_so_long(
    rope: dict[str, Any], longest: int, warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    config = tiny.model("llama", max_position_embeddings=64, rope_parameters=rope).config
    with caplog.at_level(logging.WARNING, logger="halos"):
        warn_of_rotary(config, longest)
    found = [record for record in caplog.records if record.name == "halos.policy.checks"]
    assert [record.args[0] for record in found] == ([longest] if warned else [])  # type: ignore[index]


@pytest.mark.parametrize("architecture", ["gpt2", "opt"])
def test_rows_longer_than_learned_positions_are_refused(architecture: str) -> None:
    common = {"vocab_size": 67, "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1, "ffn_dim": 8}
    config = AutoConfig.for_model(architecture, **common, max_position_embeddings=(most := 32), word_embed_proj_dim=16)
    model = AutoModelForCausalLM.from_config(config)
    check_positions(model, most)
    with torch.no_grad(), pytest.raises(IndexError):  # what would be met without the check
        model(input_ids=torch.zeros(1, most + 1, dtype=torch.long))
    with pytest.raises(ValueError, match=rf"^data\.max_length: expected at most {most}, .* a row of {most + 1} tokens"):
        check_positions(model, most + 1)


def test_rows_longer_than_a_rotary_model_was_trained_with_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny.model("llama")
    most = model.config.max_position_embeddings
    check_positions(model, most)
    assert not caplog.records
    check_positions(model, most + 1)
    assert f"the longest row has {most + 1} tokens, and LlamaForCausalLM was trained with at most {most}" in caplog.text
