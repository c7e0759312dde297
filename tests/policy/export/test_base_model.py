"""What an export takes over from its base: processor files, tokenizer files and precision."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from halos.policy.backbone import Backbone
from halos.policy.export.base_model import read_base, round_weights
from halos.policy.loading import ModelSpec
from tests import tiny


def tiny_base(folder: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    tiny.save(folder)
    AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).save_pretrained(folder)
    return folder


def exported_dtypes(folder: Path) -> set[torch.dtype]:
    return {weight.dtype for weight in load_file(folder / "model.safetensors").values()}


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("key", "expected"), [("base", None), ("float32", torch.float32), ("bfloat16", torch.bfloat16)]
)
def test_weights_are_exported_as_the_base_has_them_or_as_asked_for(
    stored: torch.dtype, key: str, expected: Any, tmp_path: Path
) -> None:
    backbone = Backbone.from_pretrained(tiny_base(tmp_path / "base", stored), export_dtype=key)
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.add_(1e-3)  # trained in float32
    backbone.save_pretrained(tmp_path / "out")
    dtype = expected or stored
    saved = load_file(tmp_path / "out" / "model.safetensors")
    assert {weight.dtype for weight in saved.values()} == {dtype}
    # One rounding of the float32 weights, which stay as they are in the policy.
    for name, weight in backbone.policy.state_dict().items():
        assert weight.dtype == torch.float32
        assert torch.equal(saved[name], weight.to(dtype))
    assert AutoConfig.from_pretrained(tmp_path / "out").dtype == dtype


def test_the_precision_is_read_from_the_weights_if_the_config_has_none(tmp_path: Path) -> None:
    file = tiny_base(tmp_path) / "config.json"
    config = json.loads(file.read_text())
    del config["dtype"]
    file.write_text(json.dumps(config))
    assert AutoConfig.from_pretrained(tmp_path).dtype is None
    assert ModelSpec(path=str(tmp_path)).base().dtype == torch.bfloat16


@pytest.mark.parametrize(("key", "expected"), [("base", None), ("float32", torch.float32)])
def test_weights_trained_in_bfloat16_are_not_widened_for_the_base(key: str, expected: Any, tmp_path: Path) -> None:
    assert ModelSpec(path=str(tiny.save(tmp_path)), export_dtype=key).base(torch.bfloat16).dtype == expected


@pytest.mark.parametrize("dtype", ["half", "float16", None])
def test_another_precision_is_refused(dtype: Any) -> None:
    with pytest.raises(ValueError, match=r"^model\.export_dtype: expected base, float32 or bfloat16, found"):
        ModelSpec(path="x", export_dtype=dtype)


def test_weights_that_an_architecture_keeps_in_float32_stay_so() -> None:
    model = tiny.model()
    model._keep_in_fp32_modules_strict = {"norm"}
    round_weights(model, torch.bfloat16)
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    assert {dtypes["model.norm.weight"]} == {torch.float32}
    assert {dtype for name, dtype in dtypes.items() if "norm" not in name} == {torch.bfloat16}


def test_files_of_a_processor_are_exported_as_they_are(tmp_path: Path) -> None:
    base = tiny.save(tmp_path / "base")
    for name in ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"):
        (base / name).write_text(f'{{"from": "{name}"}}\n')
    Backbone.from_pretrained(base).save_pretrained(tmp_path / "out")
    for name in ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (base / name).read_bytes()


def test_a_hub_id_that_cannot_be_reached_has_no_files() -> None:
    base = read_base("nobody/nothing", AutoConfig.for_model("llama"), "base", torch.float32)
    assert base.tokenizer_files == base.processor_files == {}
