"""``check_gpu(cfg)``: checks exactness, waits and speed on this machine's devices."""

import tempfile
from collections import Counter
from pathlib import Path

from omegaconf import DictConfig

from halos import terminal
from halos.checks import check_choice, check_number
from halos.files import write_atomically
from halos.gpu_check.part import Setting
from halos.gpu_check.parts import PARTS
from halos.gpu_check.report import as_json, as_markdown, machine
from halos.gpu_check.run import Outcome, run_parts
from halos.processes.errors import RunFailed


def check_gpu(cfg: DictConfig) -> list[Outcome]:
    """Run the parts, print how each ended, and write ``report.md`` and ``report.json`` to ``cfg.output``.

    Raises:
        ValueError: an unknown device or part.
        halos.processes.errors.RunFailed: if a part failed; the others have run, and the report is written.
    """
    terminal.set_up_logging()
    names = list(cfg.parts or [part.name for part in PARTS])
    for name in names:
        check_choice("parts", name, [part.name for part in PARTS])
    check_number("minutes", cfg.minutes)
    output = Path(cfg.output)
    output.mkdir(parents=True, exist_ok=True)
    device, devices = _devices(cfg.device)
    about = machine(device)
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory(prefix="halos-check-") as folder:
        setting = Setting(device=device, devices=devices, model=cfg.model, folder=Path(folder))
        for outcome in run_parts([part for part in PARTS if part.name in names], setting, limit=60 * cfg.minutes):
            outcomes.append(outcome)
            reason = f": {outcome.reason}" if outcome.reason else ""
            terminal.say(f"{outcome.name}: {outcome.state} in {outcome.seconds:.0f} s{reason}")
            # After each part, so that a machine that dies leaves a report.
            write_atomically(output / "report.md", as_markdown(outcomes, about))
            write_atomically(output / "report.json", as_json(outcomes, about))
    counts = Counter(outcome.state for outcome in outcomes)
    terminal.say(", ".join(f"{count} {state}" for state, count in counts.items()) + f"; {output / 'report.md'}")
    if wrong := [outcome.name for outcome in outcomes if outcome.wrong]:
        raise RunFailed(f"check-gpu: {', '.join(wrong)} failed; see {output / 'report.md'}")
    return outcomes


def _devices(device: str) -> tuple[str, int]:
    import torch

    check_choice("device", device, ("auto", "cpu", "cuda"))
    count = torch.cuda.device_count()
    if device == "cuda" and not count:
        raise ValueError("device: expected a CUDA device, found none; set device=cpu")
    return ("cpu", 1) if device == "cpu" or not count else ("cuda", count)
