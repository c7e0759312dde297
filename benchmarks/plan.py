"""The runs that the command line asks for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

from benchmarks.job import Job
from benchmarks.runner import Runner


@dataclass(frozen=True, slots=True)
class Plan:
    """The runs of a command. ``base`` has the model, the data and the settings of every job."""

    base: Job
    losses: tuple[str, ...]
    precisions: tuple[str, ...]
    peers: tuple[str, ...]
    repeats: int
    folder: Path
    runner: Runner

    def cases(self) -> Iterator[Job]:
        """The base job with every loss at every precision."""
        for loss, precision in product(self.losses, self.precisions):
            yield replace(self.base, loss=loss, precision=precision)

    def cold(self, job: Job) -> Job:
        """The job with a cache of its own, which is empty unless this code has run it before."""
        name = f"{job.loss}-{job.precision}-{job.repeat}-{job.name(self.runner.code)[-12:]}"
        return replace(job, cache=str(self.folder / "cache" / name))
