"""Whether this process is the first one of a run, decided without torch and before there is a process group."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec

from lightning_utilities.core.rank_zero import rank_zero_only

P = ParamSpec("P")
RANKS = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK")
"""Variables in which launchers leave the rank, in Lightning's order."""


def on_first_process() -> bool:
    """Return whether this process prints and writes the files of a run."""
    # Lightning sets the attribute when it is imported, and again when its strategy knows the rank among all nodes. It
    # is not imported here, because commands that do not need torch print as well.
    rank = getattr(rank_zero_only, "rank", None)
    if rank is None:
        rank = next((int(os.environ[name]) for name in RANKS if name in os.environ), 0)
    return bool(rank == 0)


def first_process_only(function: Callable[P, None]) -> Callable[P, None]:
    """Return a function that does nothing on processes other than the first."""

    @wraps(function)
    def on_first(*args: P.args, **kwargs: P.kwargs) -> None:
        if on_first_process():
            function(*args, **kwargs)

    return on_first
