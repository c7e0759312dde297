"""Runs the parts one after the other, each in a process of its own with a time limit."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from halos import terminal
from halos.files import write_atomically
from halos.gpu_check.part import Numbers, Part, Setting, Skipped

PASSED, FAILED, SKIPPED, STOPPED = "passed", "failed", "skipped", "stopped"
PRELOADED = ["halos.gpu_check.parts", "halos.commands.train", "transformers.models.llama.modeling_llama"]
"""Imported once, in the process from which those of the parts are forked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a part ended.

    Attributes:
        name: of the part.
        state: ``passed``, ``failed``, ``skipped`` or ``stopped``, the last one at its time limit.
        seconds: that it took.
        numbers: what it measured.
        reason: why it was skipped, or what is wrong.
        about: what it checks.
        look_at: what to read or try where something is wrong.
        trace: the traceback of an error.
    """

    name: str
    state: str
    seconds: float = 0.0
    numbers: Numbers = field(default_factory=dict)
    reason: str = ""
    about: str = ""
    look_at: str = ""
    trace: str = ""

    @property
    def wrong(self) -> bool:
        return self.state in (FAILED, STOPPED)


def run_parts(parts: Sequence[Part], setting: Setting, *, limit: float) -> Iterator[Outcome]:
    """Run the parts, and go on after those that fail.

    Args:
        parts: in their order.
        setting: what they are called with.
        limit: seconds for all of them. Those that would begin later are skipped, and so is the one that runs then.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    begin = time.monotonic()
    over = f"the time limit of {limit:g} s for all parts is over; set minutes to more"
    for part in parts:
        left = limit - (time.monotonic() - begin)
        if left <= 0:
            yield Outcome(name=part.name, about=part.about, state=SKIPPED, reason=over)
            continue
        file = setting.folder / "outcome.json"
        file.unlink(missing_ok=True)
        process = context.Process(target=_run, args=(part, setting, file))
        process.start()  # the first one waits for the imports, which count for no part
        own_limit = setting.patience * part.limit
        started, allowed = time.monotonic(), min(own_limit, left)
        process.join(allowed)
        seconds, stopped = time.monotonic() - started, process.is_alive()
        _end(process)
        if stopped and allowed < own_limit:  # it may well have passed
            result: dict[str, Any] = {"state": SKIPPED, "reason": over}
        elif stopped:
            result = {"state": STOPPED, "reason": f"it had not ended after {allowed:.0f} s"}
        elif file.exists():
            result = json.loads(file.read_text(encoding="utf-8"))
        else:
            result = {"state": FAILED, "reason": f"its process ended with exit code {process.exitcode}"}
        yield Outcome(name=part.name, about=part.about, seconds=round(seconds, 2), look_at=part.look_at, **result)


def _run(part: Part, setting: Setting, file: Path) -> None:
    os.setsid()  # a group of its own, which ends as a whole
    terminal.set_up_logging()
    try:
        result: dict[str, object] = {"state": PASSED, "numbers": dict(part.check(setting))}
    except Skipped as reason:
        result = {"state": SKIPPED, "reason": str(reason)}
    except BaseException as error:  # whatever it is, the next part goes on
        message = f"{type(error).__name__}: {error}"
        result = {"state": FAILED, "reason": message, "trace": traceback.format_exc()}
    write_atomically(file, json.dumps(result))


def _end(process: ForkServerProcess) -> None:
    """End the part if it is at its limit, and whatever it has left running."""
    process.kill()
    if process.pid is not None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    process.join()
