"""What a run exports, and that no run fails only at its export."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from halos.policy.loading import ModelSpec
from halos.processes.errors import RunFailed
from tests.stub_hub import TOKEN, Hub
from tests.train_runs import LORA, RESUMABLE, run, run_until, weights

pytestmark = pytest.mark.runs

CONTRADICTION = {"do_sample": False, "temperature": 0.9, "eos_token_id": [3, 1]}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """The toy world's model in a folder of its own, to change its files."""
    folder = ModelSpec(path="pkg://halos.toy/reference").local
    assert folder is not None
    return Path(shutil.copytree(folder, tmp_path / "base"))


def write_json(file: Path, **values: Any) -> None:
    before = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({**before, **values}))


def test_a_base_with_contradictory_generation_settings_is_trained_and_exported(base: Path, tmp_path: Path) -> None:
    write_json(base / "generation_config.json", **CONTRADICTION)
    run(tmp_path / "run", f"model.path={base}")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model").generation_config
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "model")
    assert exported.temperature is None
    assert exported.eos_token_id[:2] == [3, 1]
    assert set(exported.eos_token_id) == {3, 1, tokenizer.eos_token_id}


def test_the_layers_with_adapters_are_logged_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="halos")
    run(tmp_path, *LORA, "sampling.size=4")  # loads the model once more at its end, to sample from the reference
    assert caplog.text.count("adapters on ") == 1


def test_a_run_resumes_after_files_without_numbers_were_mended(base: Path, tmp_path: Path) -> None:
    options = (*RESUMABLE, f"model.path={base}")
    run_until("on_train_batch_start", 4, tmp_path / "run", *options)
    write_json(base / "generation_config.json", max_new_tokens=9)
    (base / "README.md").write_text("A model.")
    assert run(tmp_path / "run", *options, "resume=auto")["steps"] == 6


def test_a_base_that_cannot_be_exported_is_refused_before_the_data_are_prepared(base: Path, tmp_path: Path) -> None:
    (base / "generation_config.json").write_text(json.dumps({"num_return_sequences": 3}))
    with pytest.raises(ValueError, match=r"^model\.path: .*num_return_sequences"):
        run(tmp_path / "run", f"model.path={base}")
    assert not (tmp_path / "run").exists()


def test_a_bfloat16_base_is_exported_in_bfloat16(base: Path, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(base)
    options = (f"model.path={base}", "sampling.size=4")
    summary = run(tmp_path / "bf16", *options)
    run(tmp_path / "f32", *options, "model.export_dtype=float32")
    rounded, trained = weights(tmp_path / "bf16"), weights(tmp_path / "f32")
    assert {weight.dtype for weight in rounded.values()} == {torch.bfloat16}
    assert {weight.dtype for weight in trained.values()} == {torch.float32}
    assert all(torch.equal(rounded[name], trained[name].bfloat16()) for name in trained)
    assert summary["samples"]["kl"] >= 0


def test_a_conditioned_run_with_several_named_templates_is_exported(base: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base)
    named = {"default": tokenizer.chat_template, "tool_use": tokenizer.chat_template + "{# tools #}"}
    tokenizer.chat_template = named
    tokenizer.save_pretrained(base)
    run(tmp_path / "run", "loss=csft", f"model.path={base}")
    exported: Any = AutoTokenizer.from_pretrained(tmp_path / "run" / "model")
    assert set(exported.chat_template) == set(named)
    turns = [{"role": "user", "content": "i bought a lamp."}]
    for name in named:
        text = exported.apply_chat_template(turns, chat_template=name, add_generation_prompt=True, tokenize=False)
        assert text.endswith("<|good|>")


def test_the_model_is_pushed_after_everything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hub = Hub(monkeypatch)
    run(tmp_path, "trainer.max_steps=1", "hub.push=mylab/toy")
    create, upload = hub.calls
    assert create == ("create_repo", "mylab/toy", True)
    assert upload == ("upload_folder", "mylab/toy", sorted(file.name for file in (tmp_path / "model").iterdir()))
    assert capsys.readouterr().out.splitlines()[-1] == "hub:    https://huggingface.co/mylab/toy"
    assert not any(TOKEN in file.read_text(errors="ignore") for file in tmp_path.rglob("*") if file.is_file())


def test_a_push_that_fails_leaves_a_complete_run_and_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = Hub(monkeypatch)
    hub.failing = "upload_folder"
    words = ("trainer.max_steps=1", "hub.push=mylab/toy")
    with pytest.raises(RunFailed, match=rf"hub\.push: mylab/toy .*; .* hf upload mylab/toy {tmp_path}/model"):
        run(tmp_path, *words)
    assert (tmp_path / "summary.json").is_file()
    before = weights(tmp_path)
    hub.failing = None
    run(tmp_path, *words, "resume=auto")
    assert [call[0] for call in hub.calls] == ["create_repo", "create_repo", "upload_folder"]
    assert all(torch.equal(weight, before[name]) for name, weight in weights(tmp_path).items())


def test_a_name_without_an_owner_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^hub\.push: expected owner/name"):
        run(tmp_path / "run", "hub.push=toy")
    assert not (tmp_path / "run").exists()
