"""Multimodal models used as language models: only what text passes through is trained."""

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from halos.data.batches.collate import collate
from halos.policy.adapters import adapter_parameters
from halos.policy.construction import is_multimodal
from halos.policy.loading import ModelSpec
from halos.policy.logprobs.completions import completion_logprobs
from halos.policy.lora import LoRA
from tests import multimodal, tiny
from tests.fork import run_ranks
from tests.train_runs import run, train_as_rank

OUTSIDE = ("model.vision_tower.", "model.multi_modal_projector.")
TEXT = ("model.language_model.", "lm_head.")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return multimodal.save(tmp_path_factory.mktemp("multimodal"))


@pytest.mark.parametrize("lora", [False, True])
def test_exactly_the_trained_weights_get_a_gradient(lora: bool, base: Path) -> None:
    model = ModelSpec(path=str(base), lora=LoRA(enabled=lora, rank=2)).load()
    completion_logprobs(model, collate(tiny.rows(4, vocabulary=20), packing=False)).tokens.sum().backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert trained
    assert all(name.startswith(TEXT) for name in trained)


def test_no_adapters_go_where_no_text_does(base: Path) -> None:
    model = ModelSpec(path=str(base), lora=LoRA(enabled=True, rank=2, target_modules=["q_proj"])).load()
    assert len(adapter_parameters(model)) == 2 * 2  # A and B of two decoder layers, none of the vision tower
    plain = ModelSpec(path=str(base)).load()
    frozen = {".".join(name.split(".")[:2]) for name, p in plain.named_parameters() if not p.requires_grad}
    assert sorted(frozen) == ["model.multi_modal_projector", "model.vision_tower"]


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen2"])
def test_all_weights_of_a_language_model_are_trained(architecture: str, tmp_path: Path) -> None:
    model = ModelSpec(path=str(tiny.save(tmp_path, architecture))).load()
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not is_multimodal(model)


def check_export(base: Path, folder: Path) -> None:
    start, exported = (load_file(path / "model.safetensors") for path in (base, folder / "model"))
    assert start.keys() == exported.keys()
    moved = {name for name in start if not torch.equal(start[name], exported[name])}
    assert moved
    assert not any("vision" in name or "projector" in name for name in moved)
    assert (folder / "model" / "preprocessor_config.json").read_text() == multimodal.PROCESSOR


WORDS = ("loss=dpo", "data.batch_size=2", "trainer.max_steps=1")
TWO_STEPS = ("trainer.max_steps=2", "trainer.max_epochs=8")


@pytest.mark.runs
@pytest.mark.ranks
@pytest.mark.slow
def test_it_trains_under_ddp_as_on_one_device_and_its_other_weights_stay(base: Path, tmp_path: Path) -> None:
    words = (*WORDS, "data.source.val_size=32", f"model.path={base}", f"cache_dir={tmp_path}/cache")
    one = run(tmp_path / "one", *words, "data.batch_size=4")
    two = run_ranks(partial(train_as_rank, tmp_path / "two", *words, "strategy=ddp", "trainer.devices=2"))
    assert two[0]["train_loss"] == pytest.approx(one["train_loss"], rel=1e-4)
    for name in ("one", "two"):
        check_export(base, tmp_path / name)


def without_a_gradient(folder: Path, *words: str) -> Any:
    """A run with a vision tower that is not frozen: the same as any weights that the loss does not depend on."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("halos.policy.loading.freeze_outside_text", lambda _: None)
        try:
            return train_as_rank(folder, *words)["steps"]
        except ValueError as error:
            return str(error)


@pytest.mark.slow
@pytest.mark.runs
@pytest.mark.ranks
def test_weights_without_a_gradient_are_an_error_that_names_an_option_that_exists(base: Path, tmp_path: Path) -> None:
    renamed = Path(shutil.copytree(base, tmp_path / "renamed"))
    start = load_file(base / "model.safetensors")
    # As on the hub: transformers 5 renames weights while it loads them.
    start = {name.replace("vision_tower.", "vision_tower.vision_model."): weight for name, weight in start.items()}
    save_file(start, renamed / "model.safetensors", {"format": "pt"})
    words = (
        *WORDS,
        "data.source.val_size=32",
        f"model.path={renamed}",
        f"cache_dir={tmp_path}/cache",
        "trainer.devices=2",
    )
    for message in run_ranks(partial(without_a_gradient, tmp_path / "ddp", *words, "strategy=ddp", *TWO_STEPS)):
        assert message.startswith("strategy: expected a gradient for each trained weight")
        assert message.endswith("set strategy=fsdp")
    assert run_ranks(partial(without_a_gradient, tmp_path / "fsdp", *words, "strategy=fsdp")) == [1, 1]
    assert load_file(tmp_path / "fsdp" / "model" / "model.safetensors").keys() == start.keys()
