"""The console that all commands print to, its log handler and progress bars.

The console reads no markup, and escapes control characters in every printed string and table cell. So text from others
may be printed directly; styles are added with :func:`styled`.
"""

import logging
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
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

SHORTEST, LONGEST = 10.0, 60.0
"""The shortest and about the longest time between two lines of a log about the same work, in seconds."""
LINES = 20
"""Lines of a log about work that takes long enough for them, and not so long that :data:`LONGEST` adds others."""

STREAMS = ".*Your `IterableDataset` has `__len__` defined.*"
"""Lightning warns that the length is wrong with several workers; a stream has at most one."""
UNHELPFUL = (
    *(".*does not have many workers.*", ".*sync_dist=True.*", ".*`isinstance.treespec, LeafSpec.`.*", STREAMS),
    # A run without validation data, a device that was chosen, a launcher that was not, a first step that 16-mixed
    # skips while it looks for its scale, and the base of an adapter whose config is not on the hub.
    *(".*Total length of `list` across ranks is zero.*", ".*GPU available but not used.*", ".*`srun` command is.*"),
    *(".*`lr_scheduler.step..` before `optimizer.step..`.*", ".*Could not find a config file in.*"),
    ".*`is_gradient_checkpointing` is deprecated.*",  # which peft asks
)
"""Patterns of warnings that a user can do nothing about."""


def set_up_logging(*, models: bool = True) -> None:
    """Log this package's messages and other libraries' warnings to the console of the first process.

    The other ranks would only repeat them; a problem of a single rank is an error, which ends the run.

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
        # Hydra's in a sweep, which would print messages of libraries with a handler of their own a second time.
        if type(handler) is logging.StreamHandler:
            handler.addFilter(_unhandled)  # a handler takes a filter once, however often this is called
    ours.setLevel(logging.INFO if on_first_process() else logging.ERROR)
    if not on_first_process():
        warnings.simplefilter("ignore")
    for message in UNHELPFUL:
        warnings.filterwarnings("ignore", message)


def _unhandled(record: logging.LogRecord) -> bool:
    return not logging.getLogger(record.name.partition(".")[0]).handlers


def rewritable() -> bool:
    """Return whether the console is a terminal, on which a line can be rewritten, and not a log file."""
    return console.is_interactive and console.file.isatty()


class Pace:
    """The clock of a piece of work: when a log gets its next line about it, and how long it will still take.

    A line is due at the end. Before it is due once a twentieth of the work or :data:`LONGEST` has passed since the last
    one, but not before :data:`SHORTEST` has. The clock decides about what is printed, and about nothing else.

    Args:
        total: the number of the work's steps.
        done: the number of steps that are already done.
        clock: returns the seconds since some fixed moment.
    """

    def __init__(self, total: int, done: int = 0, clock: Callable[[], float] = time.monotonic) -> None:
        self.total, self._clock = total, clock
        self._began = self._shown = (done, clock())

    def due(self, done: int) -> bool:
        """Return whether a line about this many steps is to be printed, which then is the last one."""
        (shown, at), now = self._shown, self._clock()
        far = done - shown >= self.total / LINES or now - at >= LONGEST
        if done < self.total and not (far and now - at >= SHORTEST):
            return False
        self._shown = (done, now)
        return True

    def left(self, done: int) -> str:
        """Return how long the rest will take, such as ``0:23``; empty as long as no step was timed."""
        first, began = self._began
        if done <= first:
            return ""
        return duration((self._clock() - began) / (done - first) * (self.total - done))


def duration(seconds: float) -> str:
    """Return ``0:23``, ``12:07`` or ``26:12:07``: (hours,) minutes and seconds."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def track(name: str, work: Sequence[Item], *, shown: bool = True) -> Iterable[Item]:
    """Iterate over ``work``, and show progress on the first process: a bar, or lines if there is no terminal.

    Nothing is shown for an empty sequence.
    """
    if not (shown and on_first_process() and work):
        return work
    if not rewritable():
        return _logged(name, work)
    # A bar reads its description as markup, whatever the console does.
    description = escape(visible(name, one_line=True))
    return progress.track(work, description, console=console)


def _logged(name: str, work: Sequence[Item]) -> Iterator[Item]:
    pace = Pace(len(work))
    for done, item in enumerate(work, 1):
        yield item
        if pace.due(done):
            rest = f", {pace.left(done)} left" if done < len(work) else ""
            say(f"{name}: {done:,} of {len(work):,}{rest}")


def say(text: str) -> None:
    """Print one line of a result on the first process; commands and paths in it are not broken."""
    if on_first_process():
        console.print(text, soft_wrap=True)


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
