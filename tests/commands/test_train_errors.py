"""What is refused, before a model is loaded."""

import errno
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import lightning.pytorch as pl
import pytest
from hydra import compose as compose_config, initialize_config_dir
from omegaconf import OmegaConf

from halos.commands.builders import build_objective
from halos.config.folder import config_folder
from halos.config.nodes import plain
from halos.optim import AdamW
from tests.configs import compose
from tests.train_runs import column, run


def model_folder(folder: Path) -> str:
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer.json").write_text("{}")
    return str(folder)


def cut_gguf(folder: Path) -> str:
    file = folder / "cut.gguf"
    file.write_bytes(b"GGUF" + b"\x03\x00\x00\x00" + b"\xff" * 9)
    return str(file)


Words = Callable[[Path], list[str]]
REFUSED: dict[str, tuple[Words, str]] = {
    "no such file": (
        lambda tmp: ["data=files", f"data.train={tmp}/absent.jsonl"],
        r"absent\.jsonl: no such file",
    ),
    "no file given": (lambda tmp: ["data=files"], r"data=files needs data\.train=FILE"),
    "a bad number": (
        lambda tmp: ["data.batch_size=0"],
        r"data\.batch_size: expected a whole number from 1 on, found 0",
    ),
    "a bad knob of the toy world": (lambda tmp: ["data.source.annotator.noise=-1"], r"annotator\.noise: expected"),
    "a bad parameter of the loss": (lambda tmp: ["loss.beta=-1"], r"loss\.beta: expected a number .* found -1"),
    "an unknown kind of reference": (
        lambda tmp: ["model.reference=none"],
        r"model\.reference: expected auto, cached, live or adapter, found 'none'",
    ),
    "a head without rows": (
        lambda tmp: ["model.head_chunk=0"],
        r"model\.head_chunk: expected a whole number from 1 on, auto or null, found 0",
    ),
    "an unknown statistic": (
        lambda tmp: ["model.statistics=[entropie]"],
        r"model\.statistics: expected a list of entropy, token_accuracy, log_collision; found \['entropie'\]",
    ),
    "no folder": (lambda tmp: ["cache_dir=null"], r"cache_dir: expected a folder, found None"),
    "a validation behind the end": (
        lambda tmp: ["trainer.max_steps=3", "trainer.val_check_interval=4"],
        r"trainer\.val_check_interval: expected up to 3 micro-batches, all of the run, .* found 4",
    ),
    "a validation within a step": (
        lambda tmp: ["trainer.accumulate_grad_batches=4", "trainer.val_check_interval=6"],
        r"trainer\.val_check_interval: .* a multiple of trainer\.accumulate_grad_batches=4, .* found 6",
    ),
    "more prompts than the world has": (
        lambda tmp: ["sampling.size=5000"],
        r"sampling\.size: expected .*5000",
    ),
    "a parameter that the loss lacks": (lambda tmp: ["+loss.gama=1"], r"halos\.objectives\.KTO .*'?gama'?"),
    "a parameter that the source lacks": (lambda tmp: ["+data.source.sise=1"], r"sise"),
    "a target that is no objective": (
        lambda tmp: ["loss._target_=collections.Counter"],
        r"loss\._target_: expected a subclass of Objective, found collections\.Counter",
    ),
    "a target that is no class": (lambda tmp: ["loss._target_=mymodule.not_a_class"], r"loss\._target_: mymodule"),
    "a target that is not there": (lambda tmp: ["loss._target_=mymodule.Absent"], r"loss\._target_: mymodule\.Absent"),
    "a bad rate": (lambda tmp: ["optim.lr=-1"], r"optim\.lr: expected a number from 0 on, found -1"),
    "no model": (lambda tmp: ["model=hf"], r"model\.path: expected a hub id"),
    "a model folder without weights": (
        lambda tmp: ["model=hf", f"model.path={model_folder(tmp)}"],
        r"model\.path: expected weights \(model\.safetensors\) .*model\.random_weights=true",
    ),
    "a model folder that is not there": (lambda tmp: ["model=hf", f"model.path={tmp}/no"], r"model\.path: no such"),
    "a GGUF file that is cut off": (
        lambda tmp: ["model=hf", f"model.path={cut_gguf(tmp)}"],
        r"model\.path: .*cut\.gguf is cut off|install the extra with pip install 'halos\[gguf\]'",
    ),
    "a checkpoint that is not there": (lambda tmp: [f"resume={tmp}/no.ckpt"], r"resume: .*no\.ckpt, which does not"),
    "a folder for a checkpoint": (lambda tmp: [f"resume={tmp}"], r"resume: expected"),
    "no steps": (lambda tmp: ["trainer.max_steps=0"], r"trainer\.max_steps .*at least one step"),
}


@pytest.mark.usefixtures("no_model", "my_module")
@pytest.mark.parametrize("case", REFUSED)
def test_bad_settings_are_refused_with_their_key(case: str, tmp_path: Path) -> None:
    words, said = REFUSED[case]
    with pytest.raises(ValueError, match=said):
        run(tmp_path / "run", *words(tmp_path))
    assert not (tmp_path / "run" / "summary.json").exists()


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["loss.desirable_weight=auto", "data.source.annotator.expectation=-9"],
            "loss.desirable_weight=auto: expected both kinds",
        ),
        (["loss=ppo", "trainer.accumulate_grad_batches=2"], "trainer.accumulate_grad_batches: expected 1"),
        (["loss=sft", "humanline.enabled=true"], "humanline.enabled: expected false"),
        (["humanline.enabled=true", "humanline.log_epsilon_P=1"], "humanline.log_epsilon_P: expected a number below"),
        (["loss=cpo", "model.reference=live", "reference_sync.every=2"], "reference_sync.every: expected 0"),
        (
            ["model.reference=live", "reference_sync.every=2", "reference_sync.alpha=2"],
            "reference_sync.alpha: expected a share",
        ),
        (["reference_sync.every=2"], "reference_sync.every: expected 0, or model.reference=live, found 2"),
        (["loss=mix", "~loss.weights.sft"], "loss.weights: expected one for each of loss.parts"),
        (["loss=mix", "loss.parts.sft._target_=halos.objectives.CSFT"], "loss.parts.sft: CSFT has control tokens"),
        (["optim=adamw_8bit"], r"optim: bitsandbytes(' optimizers need a CUDA device| is missing)"),
        (["trainer.devices=2"], "trainer.devices: expected 1 with strategy=auto, .* found 2"),
        (["trainer.max_steps=0"], "at least one step"),
    ],
)
def test_a_run_refused_before_training_leaves_its_folder_free(words: list[str], said: str, tmp_path: Path) -> None:
    for _ in range(2):  # the second time, a folder that is taken would be the complaint
        with pytest.raises(ValueError, match=said):
            run(tmp_path / "run", *words)


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    "words", [[], *(pytest.param([word], marks=pytest.mark.slow) for word in ("resume=auto", "overwrite=true"))]
)
def test_a_folder_in_which_another_run_is_at_work_is_refused(words: list[str], tmp_path: Path) -> None:
    code = f"""
from halos.training.run_folder import held
with held({str(tmp_path)!r}):
    print("held", flush=True)
    input()
"""
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.read(4) == b"held"
        with pytest.raises(ValueError, match=r"output_dir: .* is in use by another run"):
            run(tmp_path, *words)
        assert [file.name for file in tmp_path.iterdir()] == [".lock"]
        other.communicate(b"\n")


@pytest.mark.parametrize("words", [(errno.ENOSPC, "No space left on device"), (errno.EDQUOT, "Quota exceeded")])
def test_a_full_disk_is_reported_with_the_folder(
    words: tuple[int, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def assemble(cfg: object) -> None:
        raise OSError(*words)  # as TensorBoard's writer does

    monkeypatch.setattr(train_module(), "assemble", assemble)
    with pytest.raises(OSError, match=f"{words[1]}: '{tmp_path}'"):
        run(tmp_path)


def train_module() -> ModuleType:
    return sys.modules["halos.commands.train"]


def test_two_runs_without_a_folder_of_their_own_get_different_ones() -> None:
    def folder() -> str:
        with initialize_config_dir(config_folder(), version_base="1.3"):
            return str(compose_config("train").output_dir)

    assert len({folder() for _ in range(5)}) == 5


def test_a_file_in_place_of_the_output_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="output_dir"):
        run(tmp_path / "file")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("sweep_metric=samples/kll",), "sweep_metric: expected val/… or one of samples/kl, .*; found 'samples/kll'"),
        (
            ("sweep_metric=samples/kl",),
            "sweep_metric: expected a run with samples .* for samples/kl, found one",
        ),
        (("sweep_metric=val/loss", "sweep_max_kl=2"), "sweep_max_kl: expected a run with samples .* for samples/kl"),
        (("sweep_metric=val/los",), "sweep_metric: expected one of .*val/loss, .*; found 'val/los'"),
        (("sweep_metric=val/los", "rounds.count=2", "rounds.round=1"), "a step"),
        (("sweep_metric=val/los", "rounds.count=2", "rounds.round=2"), "sweep_metric: expected one of .*val/loss"),
    ],
)
def test_what_a_sweep_cannot_be_told_is_found_before_the_first_step(
    words: tuple[str, ...], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fit(*_: object, **__: object) -> None:
        raise ValueError("a step")

    monkeypatch.setattr(pl.Trainer, "fit", fit)
    with pytest.raises(ValueError, match=said):
        run(tmp_path, *words)


@pytest.mark.runs
def test_a_folder_with_another_run_is_kept_unless_it_is_to_be_overwritten(tmp_path: Path) -> None:
    run(tmp_path, "trainer.max_steps=1")
    (tmp_path / "notes.txt").write_text("mine")
    before = (tmp_path / "summary.json").read_bytes()
    with pytest.raises(ValueError, match=r"output_dir: .* resume=auto .* overwrite=true"):
        run(tmp_path, "trainer.max_steps=1")
    with pytest.raises(ValueError, match="no such directory"):
        run(tmp_path, "overwrite=true", f"model.path={tmp_path}/no-model")
    assert (tmp_path / "summary.json").read_bytes() == before
    assert len(run(tmp_path, "overwrite=true", "trainer.max_steps=2")["train_loss"]) == 2
    assert list(column(tmp_path, "train/loss")) == [1, 2]
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("value", [[1], None, "x", 3])
def test_a_saved_configuration_whose_humanline_has_no_keys_is_refused(value: object) -> None:
    cfg = OmegaConf.create(plain(compose()))
    cfg.humanline = value
    with pytest.raises(ValueError, match=r"^humanline: expected keys with values, found "):
        build_objective(cfg, AdamW())
