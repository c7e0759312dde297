"""A config that asks for more than its files hold is refused before memory is taken."""

import json
import resource
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from halos.policy.limits import check_config
from halos.policy.loading import LoadOptions, ModelSpec
from halos.policy.lora import LoRA
from halos.toy.model import REFERENCE_DIR


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(REFERENCE_DIR, tmp_path / "model"))


def change(folder: Path, **values: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


LARGE: dict[str, tuple[dict[str, Any], str]] = {
    "rows": ({"vocab_size": 10**9}, "larger than its weights"),
    "layers": ({"num_hidden_layers": 9_000}, "larger than its weights"),
    "many layers": ({"num_hidden_layers": 10**9}, "expected up to 10,000 as num_hidden_layers, found 1e"),
    "labels": ({"num_labels": 10**9}, "expected up to 100,000 as num_labels"),
    "inner layers": ({"text_config": {"n_layer": 1e30}}, "expected up to 10,000 as n_layer"),
    "buffers": (
        {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4, "partial_rotary_factor": 1e8}},
        "larger than its weights",
    ),
    "wide": ({"intermediate_size": 10**12}, "larger than its weights"),
}


def loaded(spec: ModelSpec, method: str) -> None:
    spec.check()
    getattr(spec, method)(LoadOptions())


@pytest.mark.parametrize("what", LARGE)
@pytest.mark.parametrize("method", ["load", "skeleton"])
def test_a_config_that_describes_a_huge_model_is_refused(what: str, method: str, folder: Path) -> None:
    values, message = LARGE[what]
    change(folder, **values)
    start, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=rf"^model\.path: .*{message}"):
        loaded(ModelSpec(path=str(folder)), method)
    assert time.monotonic() - start < 20
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < 200 * 10**6


def test_a_config_without_sizes_is_a_model_of_seven_billion_weights(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=r"^model\.path: .* describes a model that is larger than its weights"):
        ModelSpec(path=str(folder)).load()
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < 200 * 10**6


@pytest.mark.parametrize("text", ["[]", "3", "{", "[" * 100_000, "\x00"])
def test_what_is_no_config_is_refused_by_name(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(
        ValueError, match=rf"^model\.path: expected (JSON|a JSON object) in {tmp_path}/config\.json, found"
    ):
        check_config(tmp_path / "config.json")


@pytest.mark.parametrize(("key", "value"), [("r", 10**9), ("r", 0), ("r", "x"), ("rank_pattern", {"q_proj": 2**40})])
def test_an_adapter_whose_rank_is_not_that_of_its_weights_is_refused(key: str, value: Any, tmp_path: Path) -> None:
    values = {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"], key: value}
    (tmp_path / "adapter_config.json").write_text(json.dumps(values))
    save_file({"a.lora_A.weight": torch.zeros(2, 64)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"^model\.lora\.path: expected a rank that fits .*, found"):
        LoRA(enabled=True, path=str(tmp_path)).check()


@pytest.mark.parametrize("name", ["_attn_implementation", "attn_implementation", "_experts_implementation"])
@pytest.mark.parametrize("value", ["lab/kernel", "lab/kernel@v1:f", {"": "sdpa", "text_config": "lab/kernel"}])
def test_a_config_that_names_code_of_the_hub_is_refused(name: str, value: Any, folder: Path) -> None:
    for values in ({name: value}, {"text_config": {name: value}}):
        change(folder, **values)
        with pytest.raises(ValueError, match=rf"^model\.path: .*expected no kernel of the hub, found {name} = "):
            ModelSpec(path=str(folder)).check()
    change(folder, **{name: "sdpa", "text_config": {name: None}})
    ModelSpec(path=str(folder)).check()


@pytest.mark.parametrize("value", ["x", [1], {"a": 1}])
def test_a_tokenizer_whose_settings_are_of_another_type_is_refused(value: Any, folder: Path) -> None:
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_max_length": value}))
    with pytest.raises(ValueError, match=r"^model\.path: the tokenizer of .* encodes no text: TypeError"):
        ModelSpec(path=str(folder)).tokenizer()


def test_a_tokenizer_without_the_token_that_its_model_names_is_refused(folder: Path) -> None:
    file = folder / "tokenizer.json"
    values = json.loads(file.read_text())
    values["model"] = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "[UNK]"}
    file.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"^model\.path: .*(encodes no text|could not be loaded)"):
        ModelSpec(path=str(folder)).tokenizer()


def test_a_tokenizer_with_an_id_beyond_all_vocabularies_is_refused(folder: Path) -> None:
    file = folder / "tokenizer.json"
    values = json.loads(file.read_text())
    values["model"]["vocab"][next(iter(values["model"]["vocab"]))] = 2**31
    file.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"^model\.path: expected the tokenizer .*, found an id of 2,147,483,648"):
        ModelSpec(path=str(folder)).tokenizer()
