"""What a trial of a sweep is worth."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from halos.sampling.before_after import Comparison, Samples
from halos.training.result import SAMPLES, check_metric, check_validated, result, trial_value


def run(folder: Path, auc: float, share: float, kl: float) -> Path:
    folder.mkdir()
    summary = {"metrics": {"rewards/auc": auc}, "samples": {"policy_desirable": share, "kl": kl}, "steps": 3}
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def test_a_trial_is_the_mean_of_its_runs_less_the_kl_above_the_bound(tmp_path: Path) -> None:
    runs = [run(tmp_path / "a", 0.5, 0.9, 1.0), run(tmp_path / "b", 0.7, 0.6, 4.0)]
    assert result(runs[1], "val/rewards/auc") == 0.7
    assert trial_value(runs, "val/rewards/auc") == pytest.approx(0.6)
    assert trial_value(runs, "samples/policy_desirable") == pytest.approx(0.75)
    assert trial_value(runs, "samples/policy_desirable", max_kl=2.5) == pytest.approx(0.75)
    assert trial_value(runs, "samples/policy_desirable", max_kl=2.0) == pytest.approx(0.75 - 0.5)


def test_a_number_that_a_run_lacks_is_named(tmp_path: Path) -> None:
    folder = run(tmp_path / "a", 0.5, 0.9, 1.0)
    with pytest.raises(ValueError, match=r"sweep_metric: expected of .*a one of samples/kl, .*; found 'val/los'"):
        result(folder, "val/los")


def test_the_names_of_what_is_said_of_samples_are_known_before_there_are_any() -> None:
    side = Samples([], [0.0], [False])
    assert {f"samples/{name}" for name in Comparison([], side, side, 0.0).summary()} == set(SAMPLES)
    check_metric("samples/policy_reward", max_kl=2.0, samples=True)
    check_metric(None, max_kl=None, samples=False)
    check_validated("sweep_metric", "samples/kl", {})
    with pytest.raises(ValueError, match=r"sweep_metric: expected no val/… without validation data; found 'val/loss'"):
        check_validated("sweep_metric", "val/loss", {})
