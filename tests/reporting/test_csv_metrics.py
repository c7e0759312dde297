"""metrics.csv: a table that grows to the right and downwards."""

import csv
from pathlib import Path

import pytest
from lightning.pytorch.utilities import rank_zero_only

from halos.reporting.csv_metrics import CSVMetrics


def read(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as stream:
        return list(csv.DictReader(stream))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "metrics.csv"


def filled(file: Path) -> CSVMetrics:
    logger = CSVMetrics(file)
    logger.log_metrics({"val/loss": 0.5, "epoch": 0}, 0)
    for step in (1, 2, 3):
        logger.log_metrics({"train/loss": 0.1 * step}, step)
        logger.log_metrics({"val/loss": 0.2 * step}, step)
    return logger


def test_columns_grow_and_nothing_is_lost(file: Path) -> None:
    logger = CSVMetrics(file)
    logger.log_metrics({"a": 0.1, "epoch": 0}, 0)
    logger.log_metrics({"b": 1 / 3}, 1)
    logger.log_metrics({"a": 2.0, "c": -1e-30}, 2)
    assert file.read_text().splitlines()[0] == "step,a,b,c"
    assert read(file) == [
        {"step": "0", "a": "0.1", "b": "", "c": ""},
        {"step": "1", "a": "", "b": repr(1 / 3), "c": ""},
        {"step": "2", "a": "2.0", "b": "", "c": "-1e-30"},
    ]


def test_each_row_is_on_disk_as_soon_as_it_is_logged(file: Path) -> None:
    logger = CSVMetrics(file)
    for step in range(3):
        logger.log_metrics({"a": 1.0}, step)
        assert len(read(file)) == step + 1


def test_a_resumed_run_keeps_the_rows_up_to_its_checkpoint(file: Path) -> None:
    filled(file)
    logger = CSVMetrics(file)
    logger.resume_at(2)
    logger.log_metrics({"train/loss": 9.0, "new": 7.0}, 3)
    assert [(row["step"], row["train/loss"]) for row in read(file) if row["train/loss"]] == [
        ("1", "0.1"),
        ("2", "0.2"),
        ("3", "9.0"),
    ]
    assert [row["step"] for row in read(file) if row["val/loss"]] == ["0", "1", "2"]
    assert read(file)[-1]["new"] == "7.0"


def test_resuming_into_an_empty_folder_is_no_error(file: Path) -> None:
    logger = CSVMetrics(file)
    logger.resume_at(5)
    logger.log_metrics({"a": 1.0}, 6)
    assert read(file) == [{"step": "6", "a": "1.0"}]


def test_a_logger_on_an_older_file_goes_on_with_its_columns(file: Path) -> None:
    filled(file)
    CSVMetrics(file).log_metrics({"val/loss": 7.0}, 4)
    assert len(read(file)) == 8
    assert read(file)[-1] == {"step": "4", "val/loss": "7.0", "train/loss": ""}


def test_only_the_first_process_writes(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    logger = filled(file)
    logger.resume_at(1)
    logger.log_hyperparams({"a": 1})
    assert not file.exists()


def test_a_validation_that_will_be_repeated_is_dropped(file: Path) -> None:
    filled(file).resume_at(2, validated=False)
    kept = [(row["step"], bool(row["train/loss"]), bool(row["val/loss"])) for row in read(file)]
    assert kept == [("0", False, True), ("1", True, False), ("1", False, True), ("2", True, False)]


def test_a_line_that_was_cut_off_is_dropped(file: Path) -> None:
    filled(file)
    before = file.read_text()
    file.write_text(before + "12")  # of 123,…
    CSVMetrics(file).resume_at(123)
    assert file.read_text() == before


def test_a_full_disk_names_the_file(tmp_path: Path) -> None:
    logger = CSVMetrics(tmp_path / "metrics.csv")
    logger.log_metrics({"a": 1.0}, step=1)
    logger.path.unlink()
    logger.path.symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"No space left on device: '.*metrics\.csv'"):
        logger.log_metrics({"a": 1.0}, step=2)
