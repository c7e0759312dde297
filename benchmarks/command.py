"""``scripts/benchmark.py``: reads the command line, runs sections, writes the report."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from benchmarks import inputs, liger_side
from benchmarks.job import PEERS, Job
from benchmarks.plan import Plan
from benchmarks.runner import Runner
from benchmarks.sections import SECTIONS, planned
from benchmarks.trl_side import installed

USUAL_PEERS = tuple(who for who in PEERS if who != "liger")  # which needs Triton besides
PRECISIONS = ("32-true", "bf16-mixed")


def main(words: Sequence[str] | None = None) -> None:
    """Measure what is asked for; the report is printed and written to OUTPUT/report.md after each section."""
    options = parser().parse_args(words)
    plan = plan_of(options)
    plan.runner.planned = sum(planned(name, plan) for name in options.sections)
    parts = [f"{plan.runner.machine}; {plan.base.threads} threads"]
    for name in options.sections:
        parts.append(f"### {name}\n\n{SECTIONS[name](plan)}")
        (plan.folder / "report.md").write_text("\n\n".join(parts) + "\n")
        plan.runner.keep(plan.folder / "runs.json")
        print("\n" + parts[-1], flush=True)
    print(f"\n{parts[0]}\nreport: {plan.folder / 'report.md'}, results: {plan.folder / 'runs.json'}")


def parser() -> argparse.ArgumentParser:
    """The command line's grammar; lists are separated by commas."""
    made = argparse.ArgumentParser("benchmark.py", description=__doc__)
    given = made.add_argument_group("model and data (synthetic ones where none are given)")
    given.add_argument("--model", help="a hub id, a directory or a .gguf file")
    given.add_argument("--data", help="a file of pairs, or a hub id")
    given.add_argument("--format", choices=("hh", "files"), default="hh", help="of the data, as data=hh or data=files")
    for name, default in (("hidden", 256), ("layers", 4), ("vocabulary", 32_768), ("prompt", 96), ("completion", 48)):
        given.add_argument(f"--{name}", type=int, default=default, help=f"synthetic; default {default}")
    made.add_argument("--losses", type=_listed, default=("kto", "dpo"))
    made.add_argument("--precisions", type=_choices(PRECISIONS), default=PRECISIONS)
    made.add_argument("--peers", type=_choices(PEERS), default=USUAL_PEERS)
    made.add_argument("--sections", type=_choices(SECTIONS), default=tuple(SECTIONS))
    made.add_argument("--pairs", type=int, default=32)
    made.add_argument("--batch-size", type=int, default=8)
    made.add_argument("--max-length", type=int, default=512)
    made.add_argument("--max-prompt-length", type=int, default=256)
    made.add_argument("--lr", type=float, default=5e-6)
    made.add_argument("--repeats", type=int, default=3)
    made.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    made.add_argument("--output", type=Path, default=Path("out/benchmark"))
    return made


def _listed(text: str) -> tuple[str, ...]:
    return tuple(part for part in text.split(",") if part)


def _choices(names: Collection[str]) -> Callable[[str], tuple[str, ...]]:
    def choose(text: str) -> tuple[str, ...]:
        chosen = _listed(text)
        for name in chosen:
            if name not in names:
                raise argparse.ArgumentTypeError(f"expected some of {', '.join(names)}; found {name!r}")
        return chosen

    return choose


def plan_of(options: argparse.Namespace) -> Plan:
    """The plan, with the model and the pairs in place.

    Raises ``ValueError`` for a data set without a model or the other way round, and for a peer that is not installed.
    """
    if bool(options.model) != bool(options.data):
        raise ValueError("expected --model and --data together, or neither for synthetic ones")
    if any(who.startswith("trl") for who in options.peers) and installed() is None:
        raise ValueError("--peers: trl is not installed; pip install -e '.[bench]', or --peers plain")
    if "liger" in options.peers and not liger_side.installed():
        raise ValueError("--peers: Liger is not installed; pip install liger-kernel triton, or leave liger out")
    folder: Path = options.output.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    if options.model:
        model = inputs.model_folder(options.model, folder)
        data = inputs.pairs_file(options.data, folder, source=options.format, count=options.pairs)
    else:
        size = {"hidden": options.hidden, "layers": options.layers, "vocabulary": options.vocabulary}
        model = inputs.synthetic_model(folder, **size)
        lengths = {"prompt": options.prompt, "completion": options.completion, "vocabulary": options.vocabulary}
        data = inputs.synthetic_pairs(folder, count=options.pairs, **lengths)
    base = Job(
        model=model,
        data=data,
        batch_size=options.batch_size,
        max_length=options.max_length,
        max_prompt_length=options.max_prompt_length,
        lr=options.lr,
        threads=options.threads,
    )
    asked = {name: getattr(options, name) for name in ("losses", "precisions", "peers", "repeats")}
    return Plan(base=base, folder=folder, runner=Runner(folder), **asked)
