"""What every command prints to: one console, its log handler and progress bars."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

from lightning.pytorch.utilities import rank_zero_only
from rich import progress
from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape

from halos.processes.collectives import on_first_process

console = Console(soft_wrap=False)


STREAMS = ".*Your `IterableDataset` has `__len__` defined.*"
"""Lightning's warning of a length that is wrong with several workers: a stream has one at most."""


def _not_ours(record: logging.LogRecord) -> bool:
    return record.name.partition(".")[0] != "halos"


def set_up_logging() -> None:
    """Our own messages on the first process's console; from other libraries only warnings that a user can act on."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    ours = logging.getLogger("halos")
    if not ours.handlers:
        ours.addHandler(RichHandler(console=console, show_time=False, show_path=False))
    for handler in logging.getLogger().handlers:
        if type(handler) is logging.StreamHandler:  # Hydra's, which would say all of ours once more
            handler.addFilter(_not_ours)
    ours.setLevel(logging.INFO if on_first_process() else logging.WARNING)
    for message in (
        ".*does not have many workers.*",
        ".*sync_dist=True.*",
        ".*`isinstance.treespec, LeafSpec.`.*",
        STREAMS,
    ):
        warnings.filterwarnings("ignore", message)


def track(name: str, work: Sequence[Any], *, shown: bool = True) -> Iterable[Any]:
    """Go through the work behind a progress bar, on rank 0; no bar for no work."""
    return progress.track(work, name, console=console, disable=not (shown and on_first_process() and work))


@rank_zero_only
def say(text: str) -> None:
    """One line of a result."""
    console.print(escape(text), highlight=False)
