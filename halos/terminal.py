"""What all commands print to: one console, its log handler and progress bars.

The console reads no markup, and shows control characters escaped in every string that is printed or in a table's cell.
So text of others may be passed as it is; styles are added with :func:`styled`.
"""

import logging
import warnings
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

from rich import progress
from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape
from rich.text import Text

from halos.processes.first import on_first_process
from halos.safe_text import accept_any_text, visible

Item = TypeVar("Item")


class PlainConsole(Console):
    """A console for which every string is plain text, without markup, emoji codes and control characters."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, markup=False, emoji=False, highlight=False)

    def render_str(self, text: str, *args: Any, **options: Any) -> Text:
        return super().render_str(visible(text), *args, **options)


console = PlainConsole()

STREAMS = ".*Your `IterableDataset` has `__len__` defined.*"
"""Lightning warns that the length is wrong with several workers; a stream has at most one."""
UNHELPFUL = (".*does not have many workers.*", ".*sync_dist=True.*", ".*`isinstance.treespec, LeafSpec.`.*", STREAMS)
"""Patterns of warnings that a user can do nothing about."""


def set_up_logging(*, models: bool = True) -> None:
    """Log this package's messages to the console of the first process, and other libraries' warnings only.

    Control characters in messages are shown escaped, and so is what stdout's encoding lacks.

    Args:
        models: whether the command loads models or tokenizers, so that transformers has to be quiet too.
    """
    accept_any_text()
    _show_controls()
    if models:
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
            handler.addFilter(_not_ours)  # a handler takes a filter once, however often this is called
    ours.setLevel(logging.INFO if on_first_process() else logging.WARNING)
    for message in UNHELPFUL:
        warnings.filterwarnings("ignore", message)


def _not_ours(record: logging.LogRecord) -> bool:
    return record.name.partition(".")[0] != "halos"


def track(name: str, work: Sequence[Item], *, shown: bool = True) -> Iterable[Item]:
    """Iterate over ``work`` with a progress bar on the first process; there is no bar for an empty sequence."""
    # A bar reads its description as markup, whatever the console does.
    description = escape(visible(name, one_line=True))
    return progress.track(work, description, console=console, disable=not (shown and on_first_process() and work))


def say(text: str) -> None:
    """Print one line of a result on the first process."""
    if on_first_process():
        console.print(text)


def styled(*parts: str | tuple[str, str]) -> Text:
    """Join parts to one text for the console; a part is a text, or a text and its style."""
    pairs = [(part, "") if isinstance(part, str) else part for part in parts]
    return Text.assemble(*((visible(text), style) for text, style in pairs))


class _ShownRecord(logging.LogRecord):
    """A message whose control characters are shown, whatever handler prints it."""

    def getMessage(self) -> str:
        # Ours have one line, so that a text of others cannot look like the next message.
        return visible(super().getMessage(), one_line=self.name.partition(".")[0] == "halos")


def _show_controls() -> None:
    """Show control characters in messages and warnings of all libraries."""
    logging.setLogRecordFactory(_ShownRecord)
    original = warnings.formatwarning
    if original.__module__ != __name__:  # not done before

        def shown(*args: Any, **options: Any) -> str:
            return visible(original(*args, **options))

        warnings.formatwarning = shown
