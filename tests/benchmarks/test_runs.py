"""Contestants see the same rows in the same order and count alike; a whole small run of each."""

from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import liger_side, runs, trl_side
from benchmarks.inputs import synthetic_model, synthetic_pairs
from benchmarks.job import Job
from benchmarks.sections import SWEEP


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    folder = tmp_path_factory.mktemp("inputs")
    model = synthetic_model(folder, hidden=16, layers=1, vocabulary=32)
    data = synthetic_pairs(folder, count=4, prompt=6, completion=4, vocabulary=32)
    return Job(model=model, data=data, batch_size=2, max_length=16, max_prompt_length=None, lr=0.01)


def of(job: Job, who: str, loss: str, folder: Path) -> dict:
    options = {name: getattr(job, name) for name in ("model", "data", "batch_size", "max_length", "lr")}
    return runs.train(Job(**options, max_prompt_length=None, who=who, loss=loss), folder / who)


@pytest.mark.parametrize("loss", ["kto", pytest.param("dpo", marks=pytest.mark.slow)])
def test_ours_and_the_plain_loop_train_alike(loss: str, job: Job, tmp_path: Path) -> None:
    ours, plain = of(job, "ours", loss, tmp_path), of(job, "plain", loss, tmp_path)
    assert len(ours["losses"]) == {"kto": 4, "dpo": 2}[loss]
    assert len(set(ours["losses"])) > 1
    assert ours["losses"] == pytest.approx(plain["losses"], abs=1e-5)
    assert ours["examples"] == plain["examples"] == {"kto": 8, "dpo": 4}[loss]
    assert ours["reference_seconds"] > 0 == plain["reference_seconds"]
    assert ours["operations"] == plain["operations"]
    # Chosen and rejected (or y and y'), as policy and as reference; 6 tokens of prompt and 4 of completion each.
    assert plain["tokens"] == plain["examples"] * 2 * 2 * 10
    # Trying out whether rows can be packed, in trees too, costs some tokens once.
    assert ours["needed_tokens"] < ours["tokens"] < plain["tokens"] + 600


@pytest.mark.skipif(not liger_side.installed(), reason="Liger or Triton is not installed")
@pytest.mark.parametrize("loss", ["kto", "dpo"])
def test_the_loop_with_ligers_losses_trains_alike(loss: str, job: Job, tmp_path: Path) -> None:
    plain, liger = of(job, "plain", loss, tmp_path), of(job, "liger", loss, tmp_path)
    assert liger["losses"] == pytest.approx(plain["losses"], abs=1e-5)
    assert liger["tokens"] == plain["tokens"]


@pytest.mark.skipif(find_spec("trl") is None, reason="trl is not installed")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("who", ["trl_lean", "trl_best"])
@pytest.mark.parametrize("loss", ["kto", "dpo"])
def test_patches_leave_trls_losses_as_they_are(who: str, loss: str, job: Job, tmp_path: Path) -> None:
    trl, patched = of(job, "trl", loss, tmp_path), of(job, who, loss, tmp_path)
    assert patched["losses"] == pytest.approx(trl["losses"], abs=1e-5)
    assert patched["tokens"] == trl["tokens"]


@pytest.mark.skipif(find_spec("trl") is None, reason="trl is not installed")
def test_patches_leave_out_what_the_loss_does_not_need(monkeypatch: pytest.MonkeyPatch) -> None:
    from trl.trainer import kto_trainer, utils

    asked = []
    monkeypatch.setattr(utils, "add_fused_lm_head", lambda model, **options: asked.append(options))
    with trl_side.patched("trl_lean"):
        kto_trainer.add_fused_lm_head(SimpleNamespace(forward=None), outputs=("log_probs", "entropy"))
        assert not utils._use_triton(torch.device("cpu"))
    with trl_side.patched("trl_best"):
        assert utils._use_triton(torch.device("cpu"))
    assert asked == [{}]


@pytest.mark.skipif(find_spec("trl") is None, reason="trl is not installed")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("loss", SWEEP[:5])  # TRL's ORPO is another loss: its SFT term counts the prompt
def test_trl_trains_alike(loss: str, job: Job, tmp_path: Path) -> None:
    ours, trl = of(job, "ours", loss, tmp_path), of(job, "trl", loss, tmp_path)
    assert ours["losses"] == pytest.approx(trl["losses"], abs=1e-4)
    assert trl["seconds"] > 0
    assert trl["tokens"] >= trl["examples"] * 2 * 10 * (1 if loss == "simpo" else 2)
