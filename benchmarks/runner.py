"""Jobs in processes of their own, one after the other; what has been measured is not measured again."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import sys
import time
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.job import Job
from benchmarks.trl_side import installed
from halos.files import write_atomically

ROOT = Path(__file__).parents[1]
Result = dict[str, Any]
OTHERS = ("trl", "trl_lean")
"""Contestants that compute with none of this repository's code."""


class Runner:
    """Runs jobs and keeps their results in ``folder``, a file each.

    ``records`` has every job that has been run, with its result: what a page can be written from.

    A result is found again by the job, the machine, the versions of the libraries and, except for TRL's, by this
    repository's code. Jobs that fail are reported and give None.
    """

    def __init__(self, folder: Path, *, planned: int = 0) -> None:
        self.folder, self.planned, self.done = folder, planned, 0
        for name in ("results", "logs"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        self.machine = machine()
        self.code = code_digest()
        self.records: list[dict[str, Any]] = []

    def run(self, job: Job) -> Result | None:
        """The job's result, measured now or before."""
        self.done += 1
        name = job.name(f"{self.machine} {'' if job.who in OTHERS else self.code}")
        result = self.folder / "results" / f"{name}.json"
        start = time.perf_counter()
        if not result.exists() and not self._measure(job, name, result):
            return None
        took = time.perf_counter() - start
        print(f"[{self.done}/{self.planned}] {name}: {took:.0f} s", file=sys.stderr, flush=True)
        found: Result = json.loads(result.read_text())
        self.records.append({"job": _without_paths(job), "result": found})
        return found

    def keep(self, file: Path) -> None:
        """Write the machine and all records."""
        write_atomically(file, json.dumps({"machine": self.machine, "runs": self.records}, indent=1) + "\n")

    def _measure(self, job: Job, name: str, result: Path) -> bool:
        log = self.folder / "logs" / f"{name}.log"
        job_file = result.with_suffix(".job")
        job.save(job_file)
        environment = os.environ | {
            "OMP_NUM_THREADS": str(job.threads),
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        }
        with log.open("w") as out:
            command = [sys.executable, "-m", "benchmarks.worker", str(job_file), str(result)]
            code = subprocess.run(command, env=environment, stdout=out, stderr=out, check=False).returncode
        job_file.unlink()
        if code:
            last = (log.read_text().strip().splitlines() or ["nothing was printed"])[-1]
            print(f"[{self.done}/{self.planned}] failed ({code}), see {log}: {last}", file=sys.stderr, flush=True)
        return code == 0


def _without_paths(job: Job) -> dict[str, Any]:
    return {name: value for name, value in asdict(job).items() if name not in ("model", "data", "cache")}


def machine() -> str:
    """The processor, its cores, and the versions that matter."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
    trl = installed()
    cores = f"{model or platform.processor() or platform.machine()}, {os.cpu_count()} cores"
    return f"{cores}, {versions}" + (f", trl {trl}" if trl else "")


def code_digest() -> str:
    """Of everything that our runs depend on."""
    digest = hashlib.sha256()
    for part in ("halos", "conf", "benchmarks"):
        for file in sorted((ROOT / part).rglob("*")):
            if file.suffix in (".py", ".yaml"):
                digest.update(file.read_bytes())
    return digest.hexdigest()[:12]
