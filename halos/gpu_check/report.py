"""The report of a check, for people and for programs."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version

from halos.gpu_check.run import FAILED, PASSED, SKIPPED, STOPPED, Outcome

PACKAGES = (
    "halos",
    "torch",
    "lightning",
    "transformers",
    "peft",
    "bitsandbytes",
    "liger-kernel",
    "triton",
    "vllm",
    "trl",
)


def machine(device: str) -> dict[str, str]:
    """Return what the numbers depend on: devices, driver and versions."""
    import torch

    found = {"python": platform.python_version(), "device": device}
    if device == "cuda":
        names = [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())]
        found |= {"GPUs": ", ".join(names), "CUDA": str(torch.version.cuda)}
    else:
        found |= {"processor": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def as_json(outcomes: Sequence[Outcome], about: Mapping[str, str]) -> str:
    """Return the report for programs."""
    return json.dumps({"machine": dict(about), "parts": [asdict(outcome) for outcome in outcomes]}, indent=1) + "\n"


def as_markdown(outcomes: Sequence[Outcome], about: Mapping[str, str]) -> str:
    """Return the report for people."""
    counts = {
        state: sum(outcome.state == state for outcome in outcomes) for state in (PASSED, FAILED, STOPPED, SKIPPED)
    }
    ended = ", ".join(f"{count} {state}" for state, count in counts.items())
    lines = [
        "# Check of the devices",
        "",
        f"{ended}, in {sum(outcome.seconds for outcome in outcomes):.0f} s.",
        "",
        "| part | checks | state | seconds | measured, or why not |",
        "|---|---|---|---|---|",
        *(f"| {o.name} | {o.about} | {o.state} | {o.seconds:.1f} | {_cell(o)} |" for o in outcomes),
    ]
    for outcome in (outcome for outcome in outcomes if outcome.wrong):
        lines += ["", f"## {outcome.name}", "", f"{_one_line(outcome.reason)}", "", f"Look at: {outcome.look_at}."]
        if outcome.trace:
            lines += ["", "```", *outcome.trace.strip().splitlines()[-12:], "```"]
    lines += ["", "## Machine", "", *(f"- {name}: {value}" for name, value in about.items())]
    return "\n".join(lines) + "\n"


def _cell(outcome: Outcome) -> str:
    if outcome.state != PASSED:
        return _one_line(outcome.reason)
    return "; ".join(f"{name}: {_shown(value)}" for name, value in outcome.numbers.items())


def _one_line(text: str) -> str:
    shown = " ".join(text.split()).replace("|", "\\|")
    return shown if len(shown) <= 300 else f"{shown[:300]} …"


def _shown(value: object) -> str:
    if isinstance(value, str):
        return value
    large = isinstance(value, int) or (isinstance(value, float) and value >= 1000)
    return f"{value:,.0f}" if large else f"{value:.3g}"
