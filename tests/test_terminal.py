"""The terminal: what others wrote is shown, and neither controls the terminal nor is read as markup."""

from __future__ import annotations

import io
import logging
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.table import Table

from halos import terminal
from halos.terminal import Pace
from tests.test_safe_text import BAD

Printed = pytest.CaptureFixture[str]
EVIL = "\x1b]0;title\x07\x1b[2J\x1b]52;c;AAAA\x07\x9b31m\u202e[bold]x[/] [/nothing] :smile: " + "\\" * 3
SHOWN = r"\x1b]0;title\x07\x1b[2J\x1b]52;c;AAAA\x07\x9b31m\u202e[bold]x[/] [/nothing] :smile: " + "\\" * 3


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terminal.console, "_width", 400)


def test_strings_and_styled_parts_are_shown_as_they_are(capsys: Printed) -> None:
    terminal.say(EVIL)
    terminal.console.print(terminal.styled("a", (EVIL, "bold"), EVIL))
    terminal.console.print(EVIL, EVIL)
    assert capsys.readouterr().out.splitlines() == [SHOWN, f"a{SHOWN}{SHOWN}", f"{SHOWN} {SHOWN}"]


def test_cells_headers_and_titles_of_tables_are_shown_as_they_are(capsys: Printed) -> None:
    table = Table(EVIL, title=EVIL, caption=EVIL)
    table.add_column(terminal.styled(EVIL))
    table.add_row(EVIL, terminal.styled((EVIL, "red")))
    terminal.console.print(table)
    out = capsys.readouterr().out
    assert out.count(SHOWN) == 6
    assert not set(BAD) - {"\n"} & set(out)


def test_the_name_of_a_progress_bar_is_shown_as_it_is(monkeypatch: pytest.MonkeyPatch, capsys: Printed) -> None:
    monkeypatch.setattr(terminal, "rewritable", lambda: True)
    assert list(terminal.track(EVIL, [1, 2])) == [1, 2]
    # But for names of emoji, which a bar replaces.
    assert SHOWN.replace(":smile:", "😄") in capsys.readouterr().out


def test_a_log_gets_lines_instead_of_a_bar(monkeypatch: pytest.MonkeyPatch, capsys: Printed) -> None:
    assert list(terminal.track(EVIL, range(3))) == [0, 1, 2]
    assert capsys.readouterr().out == f"{SHOWN}: 3 of 3\n"
    now = iter(range(0, 10_000, 7))  # read twice for a step that is shown
    monkeypatch.setattr(terminal, "Pace", lambda total: Pace(total, clock=lambda: float(next(now))))
    assert list(terminal.track("work", range(2000), shown=False)) == list(range(2000))
    assert capsys.readouterr().out == ""
    list(terminal.track("work", [1, 2, 3]))
    # The first line is due at 14 s, of which two steps took the clock's 21.
    assert capsys.readouterr().out.splitlines() == ["work: 2 of 3, 0:10 left", "work: 3 of 3"]
    assert list(terminal.track("work", [])) == []
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("total", "seconds", "lines"),
    [
        (100, 0.05, 1),  # 5 s
        (1000, 0.1, 10),  # 100 s: every 10 s
        (1000, 1.0, 20),  # 1,000 s: every 50 steps
        (100, 90.0, 100),  # steps of more than a minute
        (10_000, 1.0, 167),  # 10,000 s: every minute
    ],
)
def test_a_line_is_due_every_ten_seconds_twentieth_or_minute(total: int, seconds: float, lines: int) -> None:
    now = [0.0]
    pace = Pace(total, clock=lambda: now[0])
    due = []
    for done in range(1, total + 1):
        now[0] += seconds
        due.append(pace.due(done))
    assert sum(due) == pytest.approx(lines, abs=1)
    assert due[-1]


def test_the_time_left_is_that_of_the_steps_so_far() -> None:
    now = [100.0]
    pace = Pace(60, done=20, clock=lambda: now[0])
    assert pace.left(20) == ""
    now[0] += 90
    assert pace.left(30) == "4:30"  # 9 s a step
    assert [terminal.duration(s) for s in (0.4, 59.6, 3600, 94_327)] == ["0:00", "1:00", "1:00:00", "26:12:07"]


def test_a_log_file_is_no_terminal_even_where_colours_are_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terminal, "console", terminal.PlainConsole(file=io.StringIO(), force_terminal=True))
    assert not terminal.rewritable()


def test_a_terminal_with_colours_gets_no_other_controls_than_ours() -> None:
    out = io.StringIO()
    console = terminal.PlainConsole(file=out, force_terminal=True, color_system="standard", width=400)
    for character in set(BAD) - {"\n", "\t"}:
        console.print(character, terminal.styled((character, "bold")))
    plain = out.getvalue().replace("\x1b[1m", "").replace("\x1b[0m", "")
    assert not set(BAD) - {"\n"} & set(plain)


@pytest.fixture
def logged(monkeypatch: pytest.MonkeyPatch) -> Iterator[logging.Logger]:
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)  # so that it is put back
    factory = logging.getLogRecordFactory()
    terminal.set_up_logging()
    yield logging.getLogger("halos.somewhere")
    logging.setLogRecordFactory(factory)


def test_messages_are_logged_in_one_line_without_controls(logged: logging.Logger, capsys: Printed) -> None:
    logged.warning("%s\nerror: another line", EVIL)
    out = capsys.readouterr().out
    assert SHOWN + r"\nerror: another line" in " ".join(out.split())
    assert not set(BAD) - {"\n"} & set(out)


def test_messages_and_warnings_of_other_libraries_are_too(logged: logging.Logger, capsys: Printed) -> None:
    another = logging.getLogger("another")
    another.addHandler(logging.StreamHandler())
    another.propagate = False  # handlers of the root logger may write to a stream that another test has closed
    another.warning("read\n%s", EVIL)
    assert capsys.readouterr().err == f"read\n{SHOWN}\n"
    terminal.set_up_logging()  # twice is once
    assert f": {SHOWN}\n" in warnings.formatwarning(EVIL, UserWarning, "file.py", 1, "")


def test_other_ranks_repeat_no_warnings(monkeypatch: pytest.MonkeyPatch, capsys: Printed) -> None:
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    factory, logger = logging.getLogRecordFactory(), logging.getLogger("halos")
    with warnings.catch_warnings(record=True) as caught:
        for first in (False, True):
            monkeypatch.setattr(terminal, "on_first_process", lambda first=first: first)
            warnings.resetwarnings()
            terminal.set_up_logging()
            logger.warning("logged on the first process: %s", first)
            warnings.warn(f"warned on the first process: {first}", stacklevel=1)
            for message in ("Total length of `list` across ranks is zero.", "GPU available but not used."):
                warnings.warn(message, stacklevel=1)
    logging.setLogRecordFactory(factory)
    assert [line for line in capsys.readouterr().out.splitlines() if "logged" in line] == [
        f"WARNING  {'logged on the first process: True'}".ljust(400)
    ]
    assert [str(warning.message) for warning in caught] == ["warned on the first process: True"]


PRINTS = """
import warnings
from halos import terminal
from halos.terminal import Pace
from halos.config.one_line import end_with_one_line
def job():
    terminal.set_up_logging()
    terminal.say("⟦Grüße⟧ \\ud800 ✓")
    print("→", flush=True)
    warnings.warn("w \\x1b[2J")
    raise ValueError("bad: \\x1b[2J ⟦ü⟧ \\ud800")
end_with_one_line(job)
"""


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_a_command_prints_whatever_the_encoding_lacks_as_escapes(encoding: str) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "COLUMNS": "200"}
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", PRINTS], cwd=root, env=environment, capture_output=True, check=False)
    said, arrow = done.stdout.decode(encoding).splitlines()
    *warned, error = done.stderr.decode(encoding).splitlines()
    assert done.returncode == 1
    text = {"ascii": r"\u27e6Gr\xfc\xdfe\u27e7 \ud800 \u2713", "latin-1": r"\u27e6Grüße\u27e7 \ud800 \u2713"}
    assert said == text.get(encoding, r"⟦Grüße⟧ \ud800 ✓")
    assert arrow == ("→" if encoding == "utf-8" else r"\u2192")
    assert error.startswith(r"error: bad: \x1b[2J ")
    assert any(line.endswith(r"UserWarning: w \x1b[2J") for line in warned)


@pytest.mark.slow
@pytest.mark.runs
def test_a_run_whose_output_is_ascii_ends_well(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "LC_ALL": "C"}
    words = ["scripts/train.py", "trainer.max_steps=1", "data.source.size=8", f"output_dir={tmp_path}/run"]
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, *words], cwd=root, env=environment, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert rb"the tokens in \u27e6brackets\u27e7 are scored" in done.stdout
    assert (tmp_path / "run" / "summary.json").is_file()
