"""What all commands print to: one console, its log handler and progress bars."""

import logging
import warnings
from collections.abc import Iterable, Sequence
from typing import TypeVar

from rich import progress
from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape

from halos.processes.first import on_first_process

Item = TypeVar("Item")

console = Console(soft_wrap=False)

STREAMS = ".*Your `IterableDataset` has `__len__` defined.*"
"""Lightning warns that the length is wrong with several workers; a stream has at most one."""
UNHELPFUL = (".*does not have many workers.*", ".*sync_dist=True.*", ".*`isinstance.treespec, LeafSpec.`.*", STREAMS)
"""Patterns of warnings that a user can do nothing about."""


def set_up_logging() -> None:
    """Log this package's messages to the console of the first process, and other libraries' warnings only."""
    from transformers.utils import logging as transformers_logging  # slow to import, but without torch

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    ours = logging.getLogger("halos")
    if not ours.handlers:
        ours.addHandler(RichHandler(console=console, show_time=False, show_path=False))
    for handler in logging.getLogger().handlers:
        if type(handler) is logging.StreamHandler:  # Hydra's, which would print every message of ours a second time
            handler.addFilter(lambda record: record.name.partition(".")[0] != "halos")
    ours.setLevel(logging.INFO if on_first_process() else logging.WARNING)
    for message in UNHELPFUL:
        warnings.filterwarnings("ignore", message)


def track(name: str, work: Sequence[Item], *, shown: bool = True) -> Iterable[Item]:
    """Iterate over ``work`` with a progress bar on the first process; there is no bar for an empty sequence."""
    return progress.track(work, name, console=console, disable=not (shown and on_first_process() and work))


def say(text: str) -> None:
    """Print one line of a result on the first process; square brackets are not markup."""
    if on_first_process():
        console.print(escape(text), highlight=False)
