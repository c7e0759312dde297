"""The folder of a run: what is in it, and whether it may be used."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halos.files import remove, write_atomically
from halos.processes.collectives import on_first_process
from halos.training import checkpoints

CONTENTS = (
    "config.yaml",
    "data_report.json",
    "checkpoints",
    "model",
    "tensorboard",
    "metrics.csv",
    "summary.json",
    "evaluation",
)


@dataclass(frozen=True, slots=True)
class RunFolder:
    """Paths inside ``output_dir``, the same for one process and for many; only rank 0 writes."""

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
        """The checkpoint to go on from, if any; changes nothing.

        Raises ``ValueError`` if the folder holds another run than the one to go on with and ``overwrite`` is not given,
        or if the checkpoint to resume from does not exist.
        """
        checkpoint = self._checkpoint(resume)
        if self.root.exists() and not self.root.is_dir():
            raise ValueError(f"output_dir: expected a folder, found the file {self.root}")
        # Other processes may come here after the first one has begun to write.
        found = self._contents() if on_first_process() and not overwrite and not self.owns(checkpoint) else []
        if found and resume != "auto":
            raise ValueError(
                f"output_dir: {self.root} holds another run ({', '.join(found)}); choose another folder, "
                "or set resume=auto to go on with it, or overwrite=true to replace it"
            )
        if "summary.json" in found:
            raise ValueError(
                f"resume=auto: {self.root} holds a complete run whose checkpoints are gone; choose another folder, "
                "or set overwrite=true to train it anew"
            )
        return checkpoint

    def owns(self, checkpoint: Path | None) -> bool:
        """Whether the checkpoint is one of the run in this folder."""
        return checkpoint is not None and checkpoint.resolve().parent == self.checkpoints.resolve()

    def open(self, config: str, *, fresh: bool) -> None:
        """Begin to write: make the folder, remove what an earlier run left if ``fresh``, and keep the config (YAML)."""
        if on_first_process():
            self.root.mkdir(parents=True, exist_ok=True)
            for name in self._contents() if fresh else ():
                remove(self.root / name)
            checkpoints.clean(self.checkpoints)
            write_atomically(self.root / "config.yaml", config)

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Write ``summary.json``, the last file of a run: where it exists, the run is complete."""
        write_atomically(self.root / "summary.json", json.dumps(summary, indent=2, allow_nan=False) + "\n")

    def _contents(self) -> list[str]:
        return [name for name in CONTENTS if (self.root / name).exists()]

    def _checkpoint(self, resume: str | None) -> Path | None:
        if resume is None:
            return None
        if not isinstance(resume, str):
            raise ValueError(f"resume: expected 'auto' or a checkpoint's path, found {resume!r}")
        if resume == "auto":
            return checkpoints.newest(self.checkpoints)
        if not Path(resume).exists():
            raise ValueError(f"resume: expected 'auto' or a checkpoint's path, found {resume}, which does not exist")
        return checkpoints.whole(Path(resume))
