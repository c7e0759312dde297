"""``export``: a checkpoint becomes the model that the run itself would have exported."""

import json
from pathlib import Path
from typing import Any

import hydra
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from halos.commands.export import FIRST_KEYS, LISTED_KEYS, export, hyperparameters
from halos.config.folder import config_folder
from halos.config.nodes import flatten, plain
from tests.configs import compose
from tests.train_runs import LORA, RESUMABLE, run, run_until, weights

pytestmark = pytest.mark.runs

QUICK = ("trainer.max_steps=2", "checkpoint.every=2")


def test_hyperparameters_are_what_changes_the_weights_and_those_that_are_compared_stand_first() -> None:
    settings = {
        "data.keep_together": 2, "data.max_length": 64, "model.path": "m", "model.liger": True, "loss.margin": 1.0,
        "optim.lr": 1e-3, "optim.name": "adamw", "optim.betas": [0.9, 0.95], "loss.beta": 0.1, "loss.name": "mix",
        "loss._target_": "x", "loss.parts.sft._partial_": True, "loss.weights.sft": 0.5, "model.lora.enabled": True,
        "model.lora.rank": 8, "model.lora._target_": "y", "humanline.enabled": False, "humanline.log_epsilon_P": -1.0,
        "reference_sync.every": 0, "reference_sync.alpha": 0.6, "precision": "32-true", "seed": 0,
        "strategy.name": "auto", "data.select.x": 1, "trainer.max_steps": 5, "model.reference": None,
    }  # fmt: skip
    listed = hyperparameters(settings)
    assert list(listed) == [
        *("loss.name", "optim.lr", "loss.beta", "loss.margin", "optim.name", "optim.betas", "loss.weights.sft"),
        *("model.lora.enabled", "model.lora.rank", "model.path", "data.max_length", "precision", "seed", "strategy"),
    ]
    assert listed["optim.betas"] == [0.9, 0.95]
    assert "reference_sync.alpha" in hyperparameters({**settings, "reference_sync.every": 4})


def test_every_hyperparameter_is_a_key_of_the_configuration() -> None:
    words = ("output_dir=out", "model.lora.enabled=true", "humanline.enabled=true", "reference_sync.every=2")
    settings = flatten(plain(compose(*words)))
    assert {*FIRST_KEYS, *LISTED_KEYS} <= settings.keys()
    assert len(hyperparameters(settings)) < 40


def exported(*words: str) -> Path:
    with hydra.initialize_config_dir(config_folder(), version_base="1.3"):
        return export(hydra.compose("export", list(words)))


def files(folder: Path) -> dict[str, bytes]:
    """All files but the model card, which has the results of the run's end."""
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.name != "README.md"}


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lora") / "run"
    run(folder, *QUICK, *LORA)
    return folder


@pytest.mark.parametrize(
    "words",
    [
        ("loss=dpo", "data.source.feedback=pairs"),
        ("loss=csft",),
        ("loss=bradley_terry", "data.source.feedback=pairs"),
        ("loss=ppo", "model.reference=live"),
        ("model.random_weights=true", "model.export_dtype=bfloat16"),
        ("precision=bf16-true",),
        (*LORA, "loss=csft"),
        (*LORA, "model.random_weights=true"),
    ],
    ids=["dpo", "csft", "reward model", "value head", "random weights", "bf16-true", "lora csft", "lora random"],
)
def test_the_last_checkpoint_gives_the_model_of_the_run(words: tuple[str, ...], tmp_path: Path) -> None:
    run(tmp_path / "run", *QUICK, *words)
    folder = exported(f"run={tmp_path}/run")
    assert folder == tmp_path / "run" / "model_step_2"
    assert files(folder) == files(tmp_path / "run" / "model")
    assert "| `steps` | `2` |" in (folder / "README.md").read_text()


def test_a_lora_run_gives_both_a_whole_model_and_an_adapter(lora: Path, tmp_path: Path) -> None:
    assert files(exported(f"run={lora}", f"output={tmp_path}/merged")) == files(lora / "model")
    adapter = exported(f"run={lora}", f"output={tmp_path}/adapter", "lora=adapter")
    run(tmp_path / "run", *QUICK, *LORA, "model.lora.export=adapter")
    assert load_file(adapter / "adapter_model.safetensors").keys() == {
        *load_file(tmp_path / "run" / "model" / "adapter_model.safetensors")
    }
    assert files(adapter) == files(tmp_path / "run" / "model")


def test_an_unfinished_run_gives_the_model_of_a_checkpoint(tmp_path: Path) -> None:
    run_until("on_train_batch_start", 5, tmp_path / "run", *RESUMABLE)
    assert not (tmp_path / "run" / "model").exists()
    first = exported(f"run={tmp_path}/run", "checkpoint=step_2.ckpt")
    newest = exported(f"run={tmp_path}/run", f"output={tmp_path}/out")
    state = torch.load(tmp_path / "run" / "checkpoints" / "step_4.ckpt", weights_only=True)["state_dict"]
    for name, weight in load_file(newest / "model.safetensors").items():
        assert torch.equal(weight, state[f"backbone.policy.{name}"])
    one, other = (AutoModelForCausalLM.from_pretrained(folder) for folder in (first, newest))
    assert not torch.equal(one.lm_head.weight, other.lm_head.weight)


def test_another_precision_can_be_asked_for(lora: Path, tmp_path: Path) -> None:
    folder = exported(f"run={lora}", f"output={tmp_path}/out", "dtype=bfloat16")
    rounded, whole = load_file(folder / "model.safetensors"), weights(lora)
    assert all(torch.equal(rounded[name], weight.bfloat16()) for name, weight in whole.items())
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"


def test_an_output_is_replaced_only_if_asked_for(lora: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    words = (f"run={lora}", f"output={tmp_path}/out")
    with pytest.raises(ValueError, match=r"^output: .*out exists; choose another folder, or set overwrite=true"):
        exported(*words)
    assert files(exported(*words, "overwrite=true")) == files(lora / "model")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("checkpoint=step_9.ckpt",), "checkpoint: expected a name in .*checkpoints or a path, found step_9.ckpt"),
        (("checkpoint={run}/config.yaml",), "checkpoint: expected a checkpoint file, found .*config.yaml"),
        (("dtype=half",), "model.export_dtype: expected base, float32 or bfloat16, found 'half'"),
        (("lora=both",), "model.lora.export: expected merged or adapter, found 'both'"),
        (("run=nothing",), "nothing/config.yaml: expected a run's configuration"),
    ],
)
def test_what_cannot_be_exported_is_refused(words: tuple[str, ...], message: str, lora: Path, tmp_path: Path) -> None:
    words = (f"run={lora}", f"output={tmp_path}/out", *(word.format(run=lora) for word in words))
    with pytest.raises(ValueError, match=f"^{message}"):
        exported(*words)
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_of_another_model_is_refused(lora: Path, tmp_path: Path) -> None:
    run(tmp_path / "run", *QUICK, "loss=ppo")
    other = next(iter((tmp_path / "run" / "checkpoints").glob("step_*.ckpt")))
    words = (f"run={lora}", f"checkpoint='{other}'", f"output={tmp_path}/out")
    with pytest.raises(ValueError, match=r"^checkpoint: expected a checkpoint of LoRA adapters"):
        exported(*words)
    state = torch.load(other, weights_only=True)
    del state["state_dict"]["backbone.policy.lm_head.weight"]
    torch.save(state, tmp_path / "part.ckpt")
    with pytest.raises(ValueError, match=r"(?s)^checkpoint: .*part\.ckpt is not of this run's model: .*lm_head"):
        exported(f"run={tmp_path}/run", f"checkpoint={tmp_path}/part.ckpt")
    with pytest.raises(ValueError, match=r"^lora: expected null for a run without model\.lora\.enabled, found merged"):
        exported(f"run={tmp_path}/run", "lora=merged")


def test_a_run_without_checkpoints_is_refused(lora: Path, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_bytes((lora / "config.yaml").read_bytes())
    with pytest.raises(ValueError, match=r"^run: expected checkpoints in .*, found none"):
        exported(f"run={tmp_path}")


def test_a_file_that_is_no_checkpoint_of_halos_is_refused(lora: Path, tmp_path: Path) -> None:
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match=r"^checkpoint: expected a checkpoint of this program, found .*other\.ckpt"):
        exported(f"run={lora}", f"checkpoint={tmp_path}/other.ckpt")


def test_numbers_of_a_run_that_was_exported_are_its_own(lora: Path, tmp_path: Path) -> None:
    """The export changes no file of the run."""
    before: dict[str, Any] = {str(file): file.stat().st_mtime_ns for file in lora.rglob("*") if file.is_file()}
    exported(f"run={lora}", f"output={tmp_path}/out")
    assert {str(file): file.stat().st_mtime_ns for file in lora.rglob("*") if file.is_file()} == before
