"""Kill runs at random moments, resume them with resume=auto, and compare what comes out with an uninterrupted run.

    python scripts/faults.py --count 200
    python scripts/faults.py --count 50 --signal TERM --strategy ddp

Each attempt is a real training run of the toy world in processes of its own. They are forked from this one, which has
imported everything and computed nothing. A quarter of the signals is sent while a checkpoint or the export is half
written. When a run completes, its weights, metrics.csv and TensorBoard points must equal those of the uninterrupted run
to the bit, and the next run begins. The exit code is 1 if anything differs, is left over, or ends too late.
"""

from __future__ import annotations

import argparse
import csv
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hydra
import torch
import transformers.models.llama.modeling_llama  # noqa: F401 (forked processes need not import it again)
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from halos import cli
from halos.config import one_line
from halos.config.folder import config_folder
from halos.processes import launch
from halos.training.checkpoint_files import newest

RUN = (
    "trainer.accelerator=cpu",
    "trainer.enable_progress_bar=false",
    "data.source.size=12",
    "data.source.val_size=4",
    "data.batch_size=2",
    "trainer.max_epochs=1",
    "trainer.val_check_interval=0.3",
    "checkpoint.every=2",
    "model.dropout=0.1",
    "sampling.max_new_tokens=8",
    "sampling.prompts=1",
    "sampling.size=4",
    "resume=auto",
)
LIMIT = 10.0
"""Seconds within which a run must end after a signal."""
PATIENCE = 300.0


class Forked:
    """A forked process with what :mod:`halos.processes.launch` needs of ``subprocess.Popen``."""

    def __init__(self, job: Callable[[], None], log: Path, *, leader: bool = False) -> None:
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            if leader:
                os.setsid()
            os._exit(_exit_code(job, log))

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self) -> None:
        while self.poll() is None:
            time.sleep(0.01)

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _exit_code(job: Callable[[], None], log: Path) -> int:
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    code = 0
    try:
        torch.set_num_threads(1)
        one_line.end_with_one_line(job)
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def start(cfg: DictConfig, ranks: int, log: Path) -> Forked:
    """The command, with ranks of its own if there are several."""

    def start_rank(config: Path, rank: int, count: int, port: int) -> Forked:
        def job() -> None:
            os.environ |= {"LOCAL_RANK": str(rank), "NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
            os.environ |= {"MASTER_PORT": str(port), launch.ERRORS: str(config.parent)}
            # Lightning reads LOCAL_RANK when it is imported, which was in the process that this one is forked from.
            rank_zero_only.rank = rank  # type: ignore[attr-defined]
            launch.die_with_parent()
            cli._call_command(cfg)

        return Forked(job, log)

    def command() -> None:
        launch._start = start_rank  # type: ignore[assignment]
        launch.run_ranks(cfg, ranks) if ranks > 1 else cli._call_command(cfg)

    return Forked(command, log, leader=True)


def members(group: int) -> list[int]:
    """The living processes of a process group."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, pgrp = path.read_text().rpartition(") ")[2].split()[:3]
        except (OSError, ValueError):
            continue
        if int(pgrp) == group and state != "Z":
            found.append(int(path.parent.name))
    return found


def table(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as stream:
        return [{k: v for k, v in row.items() if "per_second" not in k} for row in csv.DictReader(stream)]


def points(folder: Path) -> list[tuple[str, int, float]]:
    found = EventAccumulator(str(folder / "tensorboard"), {"scalars": 0}, purge_orphaned_data=False)
    found.Reload()
    tags = [tag for tag in found.Tags()["scalars"] if "per_second" not in tag]
    return sorted((tag, event.step, event.value) for tag in tags for event in found.Scalars(tag))


def differences(folder: Path, whole: Path) -> list[str]:
    checks: dict[str, Callable[[Path], list[Any]]] = {
        "weights": lambda root: [(root / "model" / "model.safetensors").read_bytes()],
        "metrics.csv": table,
        "TensorBoard": points,
        "left over": lambda root: sorted(str(p.relative_to(root)) for p in root.rglob("*.part")),
    }
    told = []
    for name, look in checks.items():
        found, expected = look(folder), look(whole)
        if found != expected:
            more, less = ([x for x in a if x not in b] for a, b in ((found, expected), (expected, found)))
            sizes = f"{len(found)} for {len(expected)}"
            told.append(f"{name}: {sizes}, {str(more)[:300]} instead of {str(less)[:300]}")
    return told


class Campaign:
    """Attempts on one folder, one after the other."""

    def __init__(self, options: argparse.Namespace, root: Path) -> None:
        self.number = getattr(signal, "SIG" + options.signal)
        self.ranks = 1 if options.strategy == "auto" else 2
        self.random = random.Random(options.seed)
        self.root, self.folder, self.whole, self.log = root, root / "run", root / "whole", root / "log"
        extra = () if options.strategy == "auto" else ("trainer.devices=2", "data.batch_size=1")
        with hydra.initialize_config_dir(config_folder(), version_base="1.3"):
            words = [*RUN, f"strategy={options.strategy}", *extra, *options.overrides]
            self.cfgs = {
                path: hydra.compose("train", [*words, f"output_dir={path}", f"cache_dir={root}/cache"])
                for path in (self.folder, self.whole)
            }
        self.moments: Counter[str] = Counter()
        self.ends: list[float] = []
        self.wrong: list[str] = []
        self.complete = 0

    def uninterrupted(self) -> float:
        begun = time.monotonic()
        process = start(self.cfgs[self.whole], self.ranks, self.log)
        process.wait()
        if process.returncode:
            sys.exit(f"the uninterrupted run ended with {process.returncode}:\n{self.log.read_text()[-3000:]}")
        return time.monotonic() - begun

    def run(self, count: int) -> None:
        self.seconds = self.uninterrupted()
        while (sent := sum(self.moments.values())) < count or self.folder.exists():
            shutil.rmtree(self.root / "cache", ignore_errors=True)
            self.log.write_text("")
            self.attempt(hit=sent < count)

    def attempt(self, *, hit: bool) -> None:
        process = start(self.cfgs[self.folder], self.ranks, self.log)
        moment = self.wait(process) if hit else None
        if moment and process.poll() is None:
            self.strike(process, moment)
            return
        self.finish(process)

    def wait(self, process: Forked) -> str:
        """Until a moment to strike has come, or the run is over."""
        kind = self.random.choice(["any time"] * 6 + ["while saving", "while exporting"])
        pattern = {"while saving": "checkpoints/*.part", "while exporting": ".model.*.part/*"}.get(kind)
        delay = self.random.uniform(0, 0.004 if pattern else self.seconds)
        while process.poll() is None and pattern and not list(self.folder.glob(pattern)):
            time.sleep(0.0005)
        until = time.monotonic() + delay
        while process.poll() is None and time.monotonic() < until:
            time.sleep(0.0005)
        return kind

    def strike(self, process: Forked, moment: str) -> None:
        begun = time.monotonic()
        everyone = members(process.pid)
        target = self.random.choice(["group", "group", "command", "rank"]) if self.ranks > 1 else "group"
        others = [pid for pid in everyone if pid != process.pid]
        chosen = {"group": everyone, "command": [process.pid], "rank": self.random.sample(others, min(1, len(others)))}
        for pid in chosen[target] or [process.pid]:
            try:
                os.kill(pid, self.number)
            except ProcessLookupError:
                continue
        while (process.poll() is None or members(process.pid)) and time.monotonic() < begun + PATIENCE:
            time.sleep(0.01)
        self.ends.append(time.monotonic() - begun)
        where = f"{moment}, {target}"
        self.moments[where] += 1
        if members(process.pid):
            self.wrong.append(f"{where}: processes left behind")
            os.killpg(process.pid, signal.SIGKILL)
        elif self.ends[-1] > LIMIT:
            self.wrong.append(f"{where}: ended only after {self.ends[-1]:.1f} s")
        if self.number != signal.SIGKILL:
            self.check_end(process, where)

    def check_end(self, process: Forked, where: str) -> None:
        if process.returncode not in (143, 0):
            self.wrong.append(f"{where}: exit code {process.returncode}\n{self.log.read_text()[-2500:]}")
        done = [int(row["step"]) for row in table(self.folder) if row.get("train/loss")] if self.has_metrics() else []
        checkpoint = newest(self.folder / "checkpoints")
        saved = 0
        if checkpoint:
            saved = torch.load(checkpoint, weights_only=True)["global_step"]  # noqa: TID251 (of our own run)
        if saved != max(done, default=0):
            self.wrong.append(f"{where}: {max(done, default=0)} steps done, a checkpoint of {saved}")

    def has_metrics(self) -> bool:
        return (self.folder / "metrics.csv").exists()

    def finish(self, process: Forked) -> None:
        process.wait()
        if process.returncode:
            self.wrong.append(f"a resumed run ended with {process.returncode}:\n{self.log.read_text()[-2500:]}")
        else:
            self.wrong += [f"differs: {name}" for name in differences(self.folder, self.whole)]
            self.complete += 1
        shutil.rmtree(self.folder, ignore_errors=True)

    def report(self) -> str:
        lines = [f"{sum(self.moments.values())} signals ({signal.Signals(self.number).name}), {self.complete} runs"]
        lines += [f"  {count:4d} {where}" for where, count in sorted(self.moments.items())]
        ends = sorted(self.ends) or [0.0]
        lines.append(f"end after the signal: median {ends[len(ends) // 2]:.2f} s, slowest {ends[-1]:.2f} s")
        lines.append(f"an uninterrupted run takes {self.seconds:.1f} s")
        return "\n".join([*lines, *(f"WRONG: {what}" for what in self.wrong), f"{len(self.wrong)} wrong"])


def main() -> None:
    """Run the campaign that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", "--kills", type=int, default=20)
    parser.add_argument("--signal", choices=("KILL", "TERM", "INT", "USR1"), default="KILL")
    parser.add_argument("--strategy", default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="halos-faults-") as root:
        campaign = Campaign(options, Path(root))
        campaign.run(options.count)
        print(campaign.report())
    sys.exit(bool(campaign.wrong))


if __name__ == "__main__":
    main()
