"""A command that fails ends with one clear line. For an unexpected error, the traceback comes before this line."""

import errno
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hydra
from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from halos.config.errors import explain
from halos.processes.errors import RunFailed
from halos.processes.launch import ERRORS
from halos.processes.signals import caught
from halos.safe_text import accept_any_text, visible

TRACEBACK = "HALOS_TRACEBACK"
"""Environment variable that passes the user's value of HYDRA_FULL_ERROR to the other processes of the run."""
_EXPECTED = (HydraException, OmegaConfBaseException, ValueError, RunFailed)
"""Errors whose message is enough for a user; others are printed with a traceback."""


def _result(job: JobReturn) -> object:
    if job.status is JobStatus.COMPLETED:
        return job._return_value
    raise job._return_value


# Hydra's own property first prints "Error executing job with overrides: […]". Here an error is one line.
JobReturn.return_value = property(_result, JobReturn.return_value.fset)  # type: ignore[assignment,attr-defined,method-assign]


def end_with_one_line(job: Callable[[], object]) -> None:
    """Call the job; if it fails, print one clear line last and exit with status 1.

    The traceback is printed before the line if the error is unexpected, or if the user has set ``HYDRA_FULL_ERROR=1``.
    """
    os.environ.setdefault(TRACEBACK, os.environ.get("HYDRA_FULL_ERROR", ""))
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises errors instead of printing them in its own way
    accept_any_text()
    try:
        with caught():
            job()
    except Exception as error:
        fail(line_of(error))


def line_of(error: BaseException) -> str:
    """Return the line for an error. The traceback of an unexpected error is printed."""
    full_disk = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    expected = full_disk or isinstance(error, _EXPECTED) or _of_hydra(error)
    if not expected or os.environ.get(TRACEBACK) == "1":
        print(visible("".join(traceback.format_exception(error))), end="", file=sys.stderr)
    return message_of(error)


def _of_hydra(error: BaseException) -> bool:
    """Return whether the error is a system error in code of Hydra, which creates ``output_dir``."""
    files = [Path(frame.f_code.co_filename) for frame, _ in traceback.walk_tb(error.__traceback__)]
    callers = [file for file in files if file.name not in ("pathlib.py", "os.py", "<frozen os>")]
    return isinstance(error, OSError) and bool(callers) and callers[-1].is_relative_to(Path(hydra.__file__).parent)


def message_of(error: BaseException) -> str:
    if isinstance(error, HydraException | OmegaConfBaseException):  # some of them are an OSError too
        return visible(explain(error))
    if isinstance(error, OSError) and _of_hydra(error):
        found = f"{error.filename} ({error.strerror})"
        return visible(f"output_dir: expected a folder that can be written, found {found}")
    if isinstance(error, _EXPECTED):
        # ValueErrors of other packages may have several lines.
        return visible(" ".join(str(error).split()))
    return visible(f"{type(error).__name__}: {error}")


def fail(message: str) -> None:
    if folder := os.environ.get(ERRORS):  # a rank: the process that watches all ranks prints the error once
        Path(folder, f"{os.environ['LOCAL_RANK']}.txt").write_text(message, encoding="utf-8")
    else:
        print(f"error: {message}", file=sys.stderr)
    distributed: Any = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        # Only NCCL's process group still exists here (halos.processes.ranks). A normal exit would destroy it, and would
        # wait for ranks that wait for this one.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)
    sys.exit(1)
