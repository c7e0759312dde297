"""What boards show: texts of others as they are, the same sections in TensorBoard and in Weights & Biases."""

from __future__ import annotations

import html
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugin_util import markdown_to_safe_html

from halos.objectives import KTO
from halos.reporting import board_report
from halos.reporting.board_report import BoardReport, log_hparams
from halos.reporting.boards import TensorBoard, WeightsAndBiases, boards, has_boards
from tests.loop_runs import fit, objective_of, rows_for

TEXTS = (
    "a ![x](http://127.0.0.1/x.png) <img src=x> **b** _c_ `d`",
    "| end of cell | $5 ~~no~~ \\$ \\| \\",
    "# no heading\n- no list\n\n    no code",
    "\x1b]0;t\x07\u202e",
    "---",
)


@pytest.mark.parametrize("text", TEXTS)
def test_a_cell_shows_its_text_as_it_is(text: str) -> None:
    written: list[str] = []
    board = TensorBoard(SimpleNamespace(add_text=lambda name, markdown, step: written.append(markdown)))  # type: ignore[arg-type]
    board.log_table("samples", ("prompt", "reply"), [(text, "next"), ("again", text)], 1)
    page = markdown_to_safe_html(written[0])
    assert [html.unescape(cell) for cell in re.findall("<th>(.*?)</th>", page)] == ["prompt", "reply"]
    cells = [html.unescape(cell.replace("<br>", "\n")) for cell in re.findall("<td>(.*?)</td>", page)]
    # Invisible characters are escaped.
    shown = text.strip().replace("\x1b", r"\x1b").replace("\x07", r"\x07").replace("\u202e", r"\u202e")
    assert cells == [shown, "next", "again", shown]
    assert not re.search("<(?!/?(table|thead|tbody|tr|th|td|br)\\b)", page)


def events(folder: Path) -> EventAccumulator:
    found = EventAccumulator(str(folder), size_guidance={"histograms": 0, "tensors": 0})
    found.Reload()
    return found


def fit_with(logger: Any, *, steps: int, val: int = 0, accumulate: int = 1) -> None:
    size = 2 * accumulate
    rows, held = rows_for(KTO, size * steps), rows_for(KTO, val, seed=1)
    options = {"callbacks": [BoardReport()], "logger": logger, "accumulate_grad_batches": accumulate}
    fit(objective_of(KTO, moved=0.1), rows, val=held, batch_size=2, **options)


def test_training_rewards_are_histograms_of_all_examples_of_a_step(tmp_path: Path) -> None:
    fit_with(TensorBoardLogger(tmp_path, name="", version="run"), steps=4, accumulate=3)
    found = events(tmp_path / "run")
    kinds = [found.Histograms(f"train/rewards/{kind}") for kind in ("desirable", "undesirable")]
    assert [[event.step for event in kind] for kind in kinds] == [[1, 2, 3, 4]] * 2
    assert [sum(event.histogram_value.num for event in step) for step in zip(*kinds, strict=True)] == [6] * 4
    for kind, side in zip(kinds, ("chosen", "rejected"), strict=True):
        means = [event.histogram_value.sum / event.histogram_value.num for event in kind]
        assert means == pytest.approx([event.value for event in found.Scalars(f"train/rewards/{side}")], rel=1e-5)


def test_long_runs_have_few_histograms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(board_report, "HISTOGRAMS", 2)
    fit_with(TensorBoardLogger(tmp_path, name="", version="run"), steps=5)
    assert {event.step for event in events(tmp_path / "run").Histograms("train/rewards/desirable")} == {3}


def test_without_held_out_data_the_first_section_is_of_training(tmp_path: Path) -> None:
    fit_with(TensorBoardLogger(tmp_path, name="", version="run"), steps=2)
    found = events(tmp_path / "run")
    first = sorted(found.Tags()["scalars"])[0]
    assert first == "alignment/train/rewards/chosen"
    copies, originals = found.Scalars(first), found.Scalars("train/rewards/chosen")
    assert [(event.step, event.value) for event in copies] == [(event.step, event.value) for event in originals]


# Weights & Biases, by a stub with the calls that are made


@pytest.fixture
def logged(monkeypatch: pytest.MonkeyPatch) -> tuple[WandbLogger, list[dict[str, Any]], dict[str, Any]]:
    """A logger, what its run has logged, and the run's configuration."""
    entries: list[dict[str, Any]] = []
    config: dict[str, Any] = {}
    stub = SimpleNamespace(
        Histogram=lambda values: ("histogram", len(values)),
        Table=lambda columns, data: ("table", columns, data),
    )
    monkeypatch.setitem(sys.modules, "wandb", stub)
    logger = WandbLogger.__new__(WandbLogger)
    logger.__dict__.update(_prefix="", _wandb_init={}, _experiment=None)
    run = SimpleNamespace(log=entries.append, config=SimpleNamespace(update=lambda new, **_: config.update(new)))
    monkeypatch.setattr(WandbLogger, "experiment", run)
    return logger, entries, config


def trainer_with(*loggers: Any, rank_zero: bool = True) -> pl.Trainer:
    return SimpleNamespace(loggers=loggers, is_global_zero=rank_zero, global_step=7)  # type: ignore[return-value]


def test_the_boards_are_those_of_the_first_process(logged: Any) -> None:
    logger, _, _ = logged
    assert [type(board) for board in boards(trainer_with(logger))] == [WeightsAndBiases]
    assert boards(trainer_with(logger, rank_zero=False)) == []
    assert has_boards(trainer_with(logger, rank_zero=False))
    assert not has_boards(trainer_with())


def test_the_other_board_gets_the_same(logged: Any) -> None:
    logger, entries, config = logged
    (board,) = boards(trainer_with(logger))
    board.lay_out(board_report.LAYOUT)
    board_report.log_first(trainer_with(logger), {"val/kl": 0.5, "val/loss": 1.0, "val/rewards/margins": 2.0}, "val/")
    board.log_histogram("val/rewards/desirable", torch.tensor([1.0, 2.0]), 7)
    board.log_table("samples", ("prompt", "reply"), [("a\x1b", "| b")], 7)
    log_hparams(trainer_with(logger), {"loss.beta": 0.1}, {"kl": 0.5}, {"policy_desirable": 0.9})
    assert entries == [
        {"alignment/kl": 0.5, "alignment/rewards/margins": 2.0, "trainer/global_step": 7},
        {"val/rewards/desirable": ("histogram", 2), "trainer/global_step": 7},
        {"samples": ("table", ["prompt", "reply"], [[r"a\x1b", "| b"]]), "trainer/global_step": 7},
        {"val/final/samples/policy_desirable": 0.9, "trainer/global_step": 7},
    ]
    assert config == {"loss.beta": 0.1}
