"""What a run remembers of itself, across a stop too."""

import math
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from halos.reporting.csv_metrics import CSVMetrics
from halos.training.record import RunRecord, peak_gpu_mb, peak_rss_mb


def at(step: int, loggers: list[Any] | None = None, losses: tuple[float, ...] = (), **metrics: float) -> Any:
    return SimpleNamespace(
        global_step=step,
        callback_metrics={name.replace("_", "/", 1): value for name, value in metrics.items()},
        loggers=loggers or [],
        is_global_zero=True,
        lightning_module=SimpleNamespace(take_losses=lambda: list(losses)),
    )


def test_losses_are_kept_in_order_and_one_that_is_not_finite_as_none() -> None:
    record = RunRecord()
    for losses in [(0.5, math.nan), (), (0.4, math.inf)]:
        record.take_losses(at(1, losses=losses))
    assert record.train_loss == [0.5, None, 0.4, None]


def test_the_last_validation_is_kept_with_its_step() -> None:
    record = RunRecord()
    assert record.validated_at is None
    for step in (0, 4):
        record.on_validation_end(at(step, val_loss=0.1 * step, train_loss=7.0), None)
    assert record.val_metrics == {"loss": 0.4}
    assert record.validated_at == 4
    assert record.validations == [(0, {"loss": 0.0}), (4, {"loss": 0.4})]


def test_losses_and_seconds_travel_in_checkpoints() -> None:
    record = RunRecord()
    record.on_train_start(at(0), None)
    record.take_losses(at(1, losses=(0.5,)))
    time.sleep(0.02)
    state = record.state_dict()
    assert 0.02 <= state["seconds"] < 1
    record.take_losses(at(2, losses=(0.4,)))
    assert state["train_loss"] == [0.5]  # a copy, not what the run goes on to change

    resumed = RunRecord()
    resumed.load_state_dict(state)
    resumed.on_train_start(at(1), None)
    time.sleep(0.02)
    resumed.on_train_end(at(2, losses=(0.4,)), None)
    assert resumed.train_loss == [0.5, 0.4]
    assert state["seconds"] + 0.02 <= resumed.seconds < 1


def test_time_between_stop_and_resume_does_not_count() -> None:
    record = RunRecord()
    record.load_state_dict({**record.state_dict(), "seconds": 5.0})
    assert record.state_dict()["seconds"] == 5.0


def test_time_behind_the_last_step_does_not_count() -> None:
    record = RunRecord()
    record.on_train_start(at(0), None)
    record.on_train_end(at(1), None)
    seconds = record.seconds
    time.sleep(0.01)
    assert record.state_dict()["seconds"] == record.seconds == seconds > 0


@pytest.mark.parametrize(("step", "kept"), [(0, 1), (1, 2), (2, 3)])
def test_a_resumed_run_cuts_its_table_back_to_the_checkpoint(step: int, kept: int, tmp_path: Path) -> None:
    logger = CSVMetrics(tmp_path / "metrics.csv")
    for number in range(3):
        logger.log_metrics({"a": 1.0}, number)
    RunRecord().on_load_checkpoint(at(0, loggers=[logger]), None, {"global_step": step, "callbacks": {}})
    assert len((tmp_path / "metrics.csv").read_text().splitlines()) == 1 + kept


def test_peaks_are_in_mebibytes() -> None:
    held = bytearray(50 * 2**20)
    held[::4096] = b"x" * len(held[::4096])
    assert 50 < peak_rss_mb() < 2**20
    assert peak_gpu_mb() >= 0
