"""``python -m benchmarks.worker JOB RESULT``: one measurement in a process of its own."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.job import Job
from halos.files import write_atomically


def main(job_file: str, result_file: str) -> None:
    """Measure what the job says; the result appears whole or not at all."""
    import torch

    job = Job.load(Path(job_file))
    torch.set_num_threads(job.threads)
    with tempfile.TemporaryDirectory() as folder:
        result = measure(job, Path(folder))
    write_atomically(Path(result_file), json.dumps(result, indent=1))


def measure(job: Job, folder: Path) -> dict[str, Any]:
    """The numbers of one job."""
    from benchmarks import costs, profiles, runs, saved

    kinds: dict[str, Callable[[Job, Path], dict[str, Any]]] = {
        "train": runs.train,
        "profile": profiles.profile,
        "saved": saved.saved,
        "cost": costs.cost,
        "rate": costs.best_rate,
    }
    return kinds[job.kind](job, folder)


if __name__ == "__main__":
    main(*sys.argv[1:])
