"""The folder of a run: its files, and whether a new run may use it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from halos.config.runs import CONFIG
from halos.files import PART, exclusive, remove, write_atomically
from halos.processes.first import on_first_process
from halos.training import checkpoint_files

CONTENTS = (
    CONFIG, "data_report.json", "checkpoints", "model", "tensorboard", "metrics.csv", "summary.json",
    "evaluation",
)  # fmt: skip
"""The files of a run. Anything else in its folder belongs to the user and is never removed."""
LOCK = ".lock"
"""The lock file that is held by the process that writes into a run's folder."""


@contextmanager
def held(output_dir: str) -> Iterator[None]:
    """Make the folder, and keep other runs out of it until the block ends or the process dies.

    Raises:
        ValueError: another run is using the folder, or it cannot be written.
    """
    if not isinstance(output_dir, str):
        raise ValueError(f"output_dir: expected a folder, found {output_dir!r}")
    root = Path(output_dir)
    with ExitStack() as stack:
        try:
            if on_first_process():
                if not root.exists():
                    stack.callback(_remove_if_empty, root)  # a run that is refused leaves no folder
                root.mkdir(parents=True, exist_ok=True)
                stack.enter_context(exclusive(root / LOCK))
        except BlockingIOError:
            hint = "wait for its end, or choose another folder"
            raise ValueError(f"output_dir: {root} is in use by another run, which has not ended; {hint}") from None
        except OSError as error:
            found = f"{root} ({error.strerror})"
            raise ValueError(f"output_dir: expected a folder that can be written, found {found}") from None
        yield


def _remove_if_empty(folder: Path) -> None:
    with suppress(OSError):  # not empty, or gone
        folder.rmdir()


@dataclass(frozen=True, slots=True)
class RunFolder:
    """Paths inside ``output_dir``, the same for one process and for many; only the first process writes."""

    root: Path

    @property
    def checkpoints(self) -> Path:
        """Lightning checkpoints, ``last.ckpt`` among them."""
        return self.root / "checkpoints"

    @property
    def model(self) -> Path:
        """The trained policy in Hugging Face format."""
        return self.root / "model"

    def check(self, *, resume: str | None, overwrite: bool) -> Path | None:
        """Return the checkpoint to resume from; None for a new run. This changes nothing.

        Args:
            resume: ``auto``, a checkpoint's path, or None.
            overwrite: whether a run that is in the folder will be replaced.

        Raises:
            ValueError: the folder holds another run and ``overwrite`` is false, or the checkpoint does not exist.
        """
        checkpoint = self._checkpoint(resume)
        if self.root.exists() and not self.root.is_dir():
            raise ValueError(f"output_dir: expected a folder, found the file {self.root}")
        # Only the first process checks: when the others get here, it may have begun to write.
        contents = self._contents() if on_first_process() and not overwrite and not self.owns(checkpoint) else []
        if contents and resume != "auto":
            hint = "choose another folder, or set resume=auto to go on with it, or overwrite=true to replace it"
            raise ValueError(f"output_dir: {self.root} holds another run ({', '.join(contents)}); {hint}")
        if "summary.json" in contents:
            hint = "choose another folder, or set overwrite=true to train it again"
            raise ValueError(f"resume=auto: {self.root} holds a complete run whose checkpoints are gone; {hint}")
        return checkpoint

    def owns(self, checkpoint: Path | None) -> bool:
        """Return whether the checkpoint belongs to the run in this folder."""
        return checkpoint is not None and checkpoint.resolve().parent == self.checkpoints.resolve()

    def open(self, config: str, *, fresh: bool) -> None:
        """Make the folder, and write the configuration into it.

        Args:
            config: the resolved configuration (YAML).
            fresh: whether to remove what an earlier run has left.
        """
        if on_first_process():
            self.root.mkdir(parents=True, exist_ok=True)
            if fresh:
                self.clear()
            for part in self.checkpoints.glob("*.ckpt" + PART):  # of an interrupted save
                remove(part)
            write_atomically(self.root / CONFIG, config)

    def clear(self) -> None:
        """Remove what a run has written."""
        for name in self._contents() if on_first_process() else ():
            remove(self.root / name)

    def write_summary(self, summary: Mapping[str, object]) -> None:
        """Write ``summary.json``, the last file of a run: a run that has one is complete."""
        write_atomically(self.root / "summary.json", json.dumps(summary, indent=2, allow_nan=False) + "\n")

    def _contents(self) -> list[str]:
        return [name for name in CONTENTS if (self.root / name).exists()]

    def _checkpoint(self, resume: str | None) -> Path | None:
        if resume is None:
            return None
        if not isinstance(resume, str):  # resume=true is an easy mistake
            raise ValueError(f"resume: expected 'auto' or a checkpoint's path, found {resume!r}")
        if resume == "auto":
            return checkpoint_files.newest(self.checkpoints)
        if not Path(resume).exists():
            raise ValueError(f"resume: expected 'auto' or a checkpoint's path, found {resume}, which does not exist")
        checkpoint_files.check_intact(Path(resume))
        return Path(resume)
