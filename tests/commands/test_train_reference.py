"""The reference of a run: live, computed beforehand and kept, moving, or none."""

from pathlib import Path
from typing import Any

import pytest

import halos.commands.train
from halos.commands.assembly import Run
from halos.policy.reference import precompute
from tests.train_runs import assert_same_weights, run, table

pytestmark = pytest.mark.runs


@pytest.mark.parametrize(("loss", "feedback"), [("kto", "labels"), ("dpo", "pairs"), ("ppo", "labels")])
def test_before_the_first_step_a_live_reference_agrees_to_the_bit(loss: str, feedback: str, tmp_path: Path) -> None:
    run(tmp_path, f"loss={loss}", f"data.source.feedback={feedback}", "model.reference=live", "trainer.max_steps=1")
    first = {name: float(value) for name, value in table(tmp_path)[0].items() if value}
    expected = {"rewards/accuracies": 0.5, "rewards/auc": 0.5}
    for name, value in first.items():
        if any(word in name for word in ("rewards/", "log_ratio/", "z0")):
            assert value == expected.get(name.removeprefix("val/"), 0.0), name


def test_a_reference_that_is_cached_is_neither_computed_nor_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = f"cache_dir={tmp_path}/cache"
    options = ("data.source.feedback=pairs", "sampling.size=0", cache)
    batches: list[int] = []
    objectives: list[Any] = []
    score, fit = precompute._score, halos.commands.train.fit

    def counting(backbone: Any, work: Any, batch: Any) -> Any:
        batches.append(len(batch))
        return score(backbone, work, batch)

    def keeping(run: Run) -> None:
        fit(run)
        objectives.append(run.objective)

    monkeypatch.setattr(precompute, "_score", counting)
    monkeypatch.setattr(halos.commands.train, "fit", keeping)
    first = run(tmp_path / "first", "loss=dpo", *options)
    assert batches
    assert first["reference_seconds"] > 0
    batches.clear()
    # Another run of it reads what the first has left; KTO adds the mismatched completions only.
    again = run(tmp_path / "again", "loss=dpo", *options)
    assert not batches
    assert again["train_loss"] == first["train_loss"]
    assert_same_weights(tmp_path / "first", tmp_path / "again")
    computed = first["examples"] * 2 + 8
    run(tmp_path / "kto", "loss=kto", *options)
    assert 0 < sum(batches) <= computed
    for objective in objectives:
        assert objective.trained.reference is None


def test_a_damaged_cache_changes_nothing(tmp_path: Path) -> None:
    options = ("trainer.max_steps=2", "sampling.size=0", f"cache_dir={tmp_path}/cache")
    first = run(tmp_path / "first", *options)
    for file in (tmp_path / "cache").rglob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:-8])
    assert run(tmp_path / "second", *options)["train_loss"] == first["train_loss"]


def test_reference_free_kto_loads_one_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    monkeypatch.setattr("halos.policy.backbone.frozen_copy", lambda policy: made.append(policy) or policy)
    run(tmp_path / "free", "loss=kto_reference_free", "model.reference=live", "trainer.max_steps=1")
    assert not made
    run(tmp_path / "kto", "loss=kto", "model.reference=live", "trainer.max_steps=1")
    assert made


def test_a_moving_reference_is_another_run_and_compares_with_the_first_model(tmp_path: Path) -> None:
    words = ("trainer.max_steps=3", "sampling.size=16", "optim.lr=1e-2", "model.reference=live")
    plain = run(tmp_path / "plain", *words)
    synced = run(tmp_path / "synced", *words, "reference_sync.every=1", "reference_sync.alpha=1.0")
    assert synced["train_loss"][0] == plain["train_loss"][0]
    assert synced["train_loss"][1:] == pytest.approx([0.5, 0.5], abs=1e-6)
    assert plain["train_loss"][2] != pytest.approx(0.5, abs=1e-4)
    assert synced["samples"]["reference_desirable"] == plain["samples"]["reference_desirable"]
    assert synced["samples"]["kl"] > 1e-3


@pytest.mark.slow
def test_random_weights_are_compared_only_where_they_are_kept(tmp_path: Path) -> None:
    words = ("model.random_weights=true", "trainer.max_steps=1", "optim.lr=0", "sampling.size=4")
    assert "samples" not in run(tmp_path / "gone", *words)
    kept = run(tmp_path / "kept", *words, "model.reference=live")
    assert kept["samples"]["kl"] == pytest.approx(0, abs=1e-5)
