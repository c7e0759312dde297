"""The line about a run's progress: what it says, that it fits into 80 columns, and when a log gets it."""

import io
import re
from types import SimpleNamespace
from typing import Any

import pytest

from halos import terminal
from halos.reporting import progress
from halos.reporting.progress import Progress, fitted, progress_line, with_bar
from halos.terminal import PlainConsole

Printed = pytest.CaptureFixture[str]
METRICS = {"train/loss": 0.33149, "train/rewards/margins": 3.268, "val/kl": 0.7512, "train/grad_norm": 4.0}


class Data:
    """Ten examples in steps of four."""

    steps = 8

    def __init__(self, streams: bool = False) -> None:
        self.streams = streams

    def passes(self, steps: int) -> float | None:
        return None if self.streams else steps * 4 / 10


class Run:
    """A Trainer's hooks in the order of its calls, without a Trainer."""

    def __init__(self, *, streams: bool = False, log_every: int = 1, batches: int = 3) -> None:
        self.progress = Progress(Data(streams))  # type: ignore[arg-type]
        self.trainer: Any = SimpleNamespace(
            global_step=0,
            log_every_n_steps=log_every,
            callback_metrics=dict(METRICS),
            num_val_batches=[batches],
            state=SimpleNamespace(fn="fit"),
        )

    def train(self, steps: int, accumulate: int = 1) -> None:
        self.progress.on_train_start(self.trainer, None)
        for _ in range(steps):
            for micro in range(accumulate):
                self.trainer.global_step += micro == accumulate - 1
                self.progress.on_train_batch_end(self.trainer, None)

    def validate(self) -> None:
        self.progress.on_validation_start(self.trainer, None)
        for batch in range(self.trainer.num_val_batches[0]):
            self.progress.on_validation_batch_end(self.trainer, None, None, None, batch, 0)
        self.progress.on_validation_end(self.trainer, None)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that goes on by its second number with each reading."""
    now = [0.0, 0.0]

    def read() -> float:
        now[0] += now[1]
        return now[0]

    monkeypatch.setattr(progress, "Pace", lambda total, done=0: terminal.Pace(total, done, read))
    return now


def test_a_log_gets_the_first_and_the_last_step_of_a_short_run(capsys: Printed) -> None:
    Run().train(8, accumulate=3)
    assert capsys.readouterr().out.splitlines() == [
        "step 1/8  pass 1/3  loss 0.331  margin 3.27  KL 0.751",
        "step 8/8  pass 3/3  loss 0.331  margin 3.27  KL 0.751",
    ]


def test_a_long_run_has_a_line_every_ten_seconds_or_twentieth_with_the_time_that_is_left(
    clock: list[float], capsys: Printed
) -> None:
    clock[1] = 5.0  # read twice or thrice a step: for the time that is left, and for whether a line is due
    Run(streams=True).train(8)
    lines = [line.partition("  loss")[0] for line in capsys.readouterr().out.splitlines()]
    # At the second step the clock is 10 s past its start, at 5 s for the time that is left.
    assert lines[0] == "step 1/8"
    assert lines[1:3] == ["step 2/8  1:00 left", "step 3/8  0:50 left"]
    assert lines[-1] == "step 8/8"


def test_metrics_are_read_when_a_step_is_logged_and_the_kl_stays_until_the_next(capsys: Printed) -> None:
    run = Run(log_every=4)
    run.train(1)
    run.train(3)
    run.trainer.callback_metrics = {"train/loss": 0.25}
    run.train(4)
    assert capsys.readouterr().out.splitlines() == [
        "step 1/8  pass 1/3",
        "step 8/8  pass 3/3  loss 0.25  margin 3.27  KL 0.751",
    ]


def test_a_resumed_run_counts_on(capsys: Printed) -> None:
    run = Run()
    run.trainer.global_step = 6
    run.train(2)
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines()] == ["7/8", "8/8"]


def test_each_validation_is_one_line(capsys: Printed) -> None:
    run = Run()
    run.trainer.global_step = 4
    run.trainer.callback_metrics = {"val/loss": 0.5, "val/rewards/margins": -1e-9, "val/rewards/auc": 0.95712}
    run.validate()
    assert capsys.readouterr().out == "validation at step 4  loss 0.5  margin 0  AUC 0.957\n"


def test_a_long_validation_says_how_far_it_is(clock: list[float], capsys: Printed) -> None:
    clock[1] = 30.0
    Run().validate()
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["validation 1/3  1:00 left", "validation 2/3  0:45 left"]
    assert len(lines) == 3


def test_other_ranks_print_nothing(capsys: Printed) -> None:
    run = Run()
    run.progress.disable()
    run.train(8)
    run.validate()
    assert capsys.readouterr().out == ""


def test_a_terminal_has_one_line_of_its_width_at_most_and_keeps_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    console = PlainConsole(file=out, force_terminal=True, width=80)
    monkeypatch.setattr(progress, "console", console)
    monkeypatch.setattr(progress, "rewritable", lambda: True)
    monkeypatch.setattr(progress, "REWRITTEN", 0.0)
    run = Run()
    run.train(4)
    run.validate()
    run.train(4)
    run.progress.on_train_end(run.trainer, None)
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "\r", out.getvalue())
    states = [state for state in re.split(r"[\r\n]+", shown) if state]
    steps = [state.split("step ")[1].split()[0] for state in states if "pass" in state]
    assert list(dict.fromkeys(steps)) == [f"{n}/8" for n in range(1, 9)]
    assert max(map(len, states)) <= 80
    for kept in ("validation at step 4  KL 0.751\n", "step 8/8  pass 3/3  loss 0.331  margin 3.27  KL 0.751\n"):
        assert kept in out.getvalue()
    assert out.getvalue().endswith("\x1b[1A\x1b[2K")  # the line of the seventh step is removed


def test_a_failure_gives_the_terminal_back(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    monkeypatch.setattr(progress, "console", PlainConsole(file=out, force_terminal=True, width=80))
    monkeypatch.setattr(progress, "rewritable", lambda: True)
    run = Run()
    run.train(2)
    assert out.getvalue().rfind("\x1b[?25l") > out.getvalue().rfind("\x1b[?25h")  # the cursor is hidden
    run.progress.on_exception(run.trainer, None, RuntimeError())
    assert out.getvalue().rfind("\x1b[?25h") > out.getvalue().rfind("\x1b[?25l")


def test_the_longest_line_has_80_columns() -> None:
    values = {"loss": -1.2345e-05, "margin": -123456.0, "KL": 1234.5}
    line = progress_line(1_200_000, 1_250_000, (99, 100), "123:05:33", values)
    assert line == "step 1200000/1250000  pass 99/100  123:05:33 left  loss -1.2e-05  margin -123000"
    assert len(line) == 80
    assert progress_line(1, 9, None, "", {}) == "step 1/9"


def test_what_does_not_fit_is_left_out_from_the_end() -> None:
    assert fitted(["abc", "de", "f"], 8) == "abc  de"
    assert fitted(["abc", "de", "f"], 10) == "abc  de  f"
    assert fitted(["abc"], 1) == "abc"


@pytest.mark.parametrize(("width", "bar"), [(14, ""), (15, "━━━━━╌╌╌╌╌ "), (80, "━━━━━━━━━━━━╌╌╌╌╌╌╌╌╌╌╌╌ ")])
def test_a_bar_stands_where_there_is_room_for_it(width: int, bar: str) -> None:
    assert with_bar("line", 0.5, width, plain=False) == f"{bar}line"
    assert with_bar("line", 0.5, width, plain=True) == "line"
