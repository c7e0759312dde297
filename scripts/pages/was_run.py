"""The page of what was run where: from test files and their markers, and from reports of ``halos check-gpu``."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml

from halos.gpu_check.parts import PARTS
from scripts.pages.text import page, table

ROOT = Path(__file__).parents[2]
FEATURES = Path(__file__).with_suffix(".yaml")
REPORTS = ROOT / "docs" / "results" / "gpu"
KEYS = {"feature", "cpu", "ranks", "traced", "gpu", "gpus", "cluster"}
COLUMNS = ("feature", "CPU", "two processes or more", "one GPU", "several GPUs", "cluster")
NONE, WRITTEN = "–", "written only"

MEASURED = (
    ("all losses on the toy world, seed 0", "one CPU device", "[losses](../losses/index.md)"),
    ("eight claims of the KTO paper", "one CPU device", "[claims](../results/claims.md)"),
    (
        "DPO and KTO on 512 examples of HH, SmolLM2-135M",
        "two CPU cores",
        "[real feedback](../results/real-feedback.md)",
    ),
    (
        "`fit_value` on 1,154 pairs of HH, with a linear reward model on words",
        "CPU",
        "[the value function of your annotators](../guides/fit-value.md#on-anthropic-hh)",
    ),
    ("KTO and DPO next to TRL 1.16 and plain loops", "AMD EPYC and Xeon, two cores", "[speed](../results/speed.md)"),
    ("kernels and waits of a step", "counted on a CPU", "[launches](../results/launches.md)"),
    ("an index of 10⁸ reference log-probs, tables of 10⁷ rows", "two CPU cores", "[scale](../results/scale.md)"),
    (
        "ten losses and their gradients against TRL 1.16, to 1e-5 in float32",
        "one CPU device, `make parity`",
        "[test_trl.py](../../parity/test_trl.py) states where the definitions differ",
    ),
    ("54 architectures, one step each, tiny", "one CPU device", "[architectures](architectures.md)"),
    (
        "`ddp`, `fsdp`, `fsdp_tp`; two nodes over loopback; torchrun",
        "two to four gloo processes on one CPU",
        "[devices](../guides/devices.md#what-was-tested)",
    ),
    ("200 kills, 100 SIGTERMs", "CPU", "[faults](../results/faults.md)"),
    ("LoRA's memory on SmolLM2-135M", "one CPU device", "[LoRA](../guides/lora.md#memory)"),
    ("2 million rows prepared, and streamed", "two CPU cores", "[streams](../guides/streams.md#what-was-measured)"),
    (
        "the fast tests with the oldest allowed packages on Python 3.11 (`make test-oldest`)",
        "two CPU cores",
        "pass; run in parts, some with still older packages",
    ),
    ("joblib, `submitit_local` and Ray launchers", "one machine", "[sweeps](../guides/sweeps.md)"),
)


def was_run_page() -> str:
    """Return the page, in Markdown."""
    reports = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(REPORTS.glob("*.json"))]
    features = yaml.safe_load(FEATURES.read_text(encoding="utf-8"))
    return page(
        "# What was run where",
        "<!-- written by `python scripts/write_docs.py` from scripts/pages/was_run.yaml, the markers of the tests that "
        "it names, and the reports in docs/results/gpu -->",
        _about(reports),
        table(COLUMNS, [row(feature, reports) for feature in features]),
        [
            "- *tested*: a test runs it there; the link leads to one.",
            "- *traced*: a test runs the same code on the meta device, where reading a value or mixing devices raises, "
            "or with stand-ins for the kernels.",
            "- *written only*: the code has not been run there.",
            f"- {NONE}: it does not exist there, or has nothing that is particular to the place.",
        ],
        "Whoever has a GPU can fill the table in ten minutes: `halos check-gpu output=out/gpu` "
        "([devices](../guides/devices.md#check-a-machine)). Its `report.json` goes to docs/results/gpu.",
        "## Measurements",
        "Each page states its machine. No number in this documentation is from a GPU unless it says so.",
        table(("what", "where", "result"), MEASURED),
        "Python 3.12 and 3.14, and the workflows on GitHub, have not been run.",
    )


def _about(reports: Sequence[dict[str, Any]]) -> str:
    machines = [report["machine"]["GPUs"] for report in reports if report["machine"]["device"] == "cuda"]
    return f"GPUs: {'; '.join(machines) or 'none so far'}."


def row(feature: dict[str, Any], reports: Sequence[dict[str, Any]]) -> list[str]:
    """Return the cells of a feature.

    Raises:
        ValueError: a test file that does not exist or lacks the marker, or an unknown key or part.
    """
    name = feature["feature"]
    if unknown := feature.keys() - KEYS:
        raise ValueError(f"{name}: expected the keys {', '.join(sorted(KEYS))}, found {', '.join(sorted(unknown))}")
    traced = _link("traced", feature["traced"], name) if "traced" in feature else WRITTEN
    return [
        name,
        _link("tested", feature["cpu"], name) if "cpu" in feature else NONE,
        _link("tested", feature["ranks"], name, marker="ranks") if "ranks" in feature else NONE,
        _on_gpu(feature["gpu"], reports, name, otherwise=traced) if "gpu" in feature else NONE,
        _on_gpu(feature["gpus"], reports, name, otherwise=WRITTEN, several=True) if "gpus" in feature else NONE,
        NONE if "cluster" not in feature else _cluster(feature["cluster"], name),
    ]


def _cluster(test: str | None, feature: str) -> str:
    return WRITTEN if test is None else _link("dry run", test, feature)


def _link(word: str, test: str, feature: str, marker: str = "") -> str:
    file = ROOT / test
    if not file.is_file() or (marker and f"mark.{marker}" not in file.read_text(encoding="utf-8")):
        expected = "a test file" + (f" with the marker {marker}" if marker else "")
        raise ValueError(f"{feature}: expected {expected}, found {test}")
    return f"[{word}](../../{test})"


def _on_gpu(
    parts: Iterable[str], reports: Sequence[dict[str, Any]], feature: str, *, otherwise: str, several: bool = False
) -> str:
    wanted = set(parts)
    if unknown := wanted - {part.name for part in PARTS}:
        raise ValueError(f"{feature}: expected parts of halos check-gpu, found {', '.join(sorted(unknown))}")
    for report in reports:
        names = report["machine"].get("GPUs", "")
        states = {part["name"]: part["state"] for part in report["parts"]}
        if not names or not wanted or (several and "," not in names):
            continue
        if wrong := [name for name in sorted(wanted) if states.get(name) in ("failed", "stopped")]:
            return f"failed ({', '.join(wrong)}, {names})"
        if all(states.get(name) == "passed" for name in wanted):
            return f"tested ({names})"
    return otherwise
