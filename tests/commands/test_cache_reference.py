"""The reference's log-probs alone: what training would compute, and nothing twice."""

import functools
from pathlib import Path
from typing import Any

import pytest

from halos.commands.cache_reference import cache_reference
from halos.commands.train import train
from halos.policy.reference import precompute
from halos.reporting.run_report import CacheReport
from tests.configs import compose
from tests.fork import run_ranks

SMALL = (
    *("data.source.size=12", "data.source.val_size=4", "data.batch_size=4", "trainer.max_epochs=1", "sampling.size=0"),
    *("logger=none", "trainer.enable_progress_bar=false", "trainer.accelerator=cpu", "sampling.prompts=0"),
)


def filled(folder: Path, *words: str) -> CacheReport:
    return cache_reference(compose(*SMALL, f"cache_dir={folder}/cache", f"output_dir={folder}/run", *words))


@pytest.mark.runs
def test_training_computes_nothing_afterwards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = filled(tmp_path)
    assert first["computed"] == first["completions"] > 20
    assert first["found"] == 0
    assert list(Path(first["folder"]).rglob("*.safetensors"))
    assert not (tmp_path / "run").exists()
    again = filled(tmp_path)
    assert (again["found"], again["computed"]) == (first["completions"], 0)
    monkeypatch.setattr(precompute, "_score", lambda *_: pytest.fail("it was computed again"))
    train(compose(*SMALL, f"cache_dir={tmp_path}/cache", f"output_dir={tmp_path}/run"))
    kept = (tmp_path / "run" / "summary.json").read_bytes()
    assert filled(tmp_path)["computed"] == 0  # and a run that is there stays as it is
    assert (tmp_path / "run" / "summary.json").read_bytes() == kept


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("loss=sft",), "loss=sft: expected a loss with a reference, found one that reads none"),
        (("loss=kto_reference_free",), "loss=kto_reference_free: expected a loss with a reference"),
        (("model.reference=live",), "model.reference: expected cached, found live"),
    ],
)
def test_where_there_is_nothing_to_compute_it_says_so_before_data_are_read(
    words: tuple[str, ...], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("halos.data.module.PreferenceDataModule.prepare", lambda *_: pytest.fail("data were read"))
    with pytest.raises(ValueError, match=said):
        filled(tmp_path, *words)


def as_rank(folder: Path) -> CacheReport:
    precompute.TOKENS = 60
    return filled(folder, "strategy=ddp", "trainer.devices=2", "data.batch_size=2")


@pytest.mark.slow
@pytest.mark.ranks
def test_two_processes_fill_it_for_one(tmp_path: Path) -> None:
    one, other = run_ranks(functools.partial(as_rank, tmp_path))
    assert one["computed"] == one["completions"] == other["completions"] > 20
    alone = filled(tmp_path)
    assert (alone["found"], alone["computed"]) == (one["completions"], 0)


def test_what_a_killed_call_found_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precompute, "TOKENS", 60)
    monkeypatch.setattr(precompute, "KEEP_SECONDS", 0.0)
    score, calls = precompute._score, []

    def killed(*args: Any) -> Any:
        calls.append(len(args[1]))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return score(*args)

    monkeypatch.setattr(precompute, "_score", killed)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        filled(tmp_path)
    monkeypatch.setattr(precompute, "_score", score)
    again = filled(tmp_path)
    assert again["found"] == sum(calls[:3]) > 0
    assert again["computed"] == again["completions"] - again["found"] > 0
    # Three parts of the killed call, and one with what this call found: its own parts on the way are gone.
    assert len(list(Path(again["folder"]).rglob("*.safetensors"))) == 4
