"""Run the referee and write its report: ``python -m parity.referee [--halos CHECKOUT] [--out docs/results]``."""

from __future__ import annotations

import argparse
import importlib
import json
import os
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from parity.referee.properties import PROPERTIES
from parity.referee.report import Row, markdown
from parity.referee.subject import Findings, Subject

LIBRARIES = {"trl": "TRL", "liger": "Liger"}


def main() -> None:
    """Check every property on every loss that is installed."""
    parser = argparse.ArgumentParser(prog="python -m parity.referee", description=__doc__)
    parser.add_argument("--halos", type=Path, help="a checkout of the HALOs repository")
    parser.add_argument("--out", type=Path, default=Path("docs/results"), help="folder of referee.md and referee.json")
    parser.add_argument("--only", help="libraries, such as trl,liger; the rest of an earlier referee.json is kept")
    options = parser.parse_args()
    torch.set_num_threads(1)
    file = options.out / "referee.json"
    earlier = json.loads(file.read_text(encoding="utf-8")) if options.only and file.exists() else []
    wanted = options.only.split(",") if options.only else [*LIBRARIES, "halos"]
    rows = [row for subject in subjects(wanted, options.halos) for row in judge(subject)]
    done = {row["library"] for row in rows}
    rows = [*(row for row in earlier if row["library"] not in done), *rows]
    file.write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    (options.out / "referee.md").write_text(markdown(rows), encoding="utf-8")


def subjects(wanted: list[str], checkout: Path | None) -> list[Subject]:
    """Return the losses of the libraries that are installed, and of the checkout."""
    found: list[Subject] = []
    for module, library in LIBRARIES.items():
        if module not in wanted:
            continue
        try:
            made = importlib.import_module(f"parity.referee.{module}").subjects()
        except ImportError as error:
            print(f"{library}: not installed ({error})")
            continue
        for subject in made:
            subject.library, subject.version = library, version(subject.package)
        found += made
    if checkout and "halos" in wanted:
        from parity.referee import halos_repository

        found += halos_repository.subjects(checkout)
    return found


def judge(subject: Subject) -> list[Row]:
    """Return what was found about each property of a loss."""
    rows = []
    for name, check in PROPERTIES.items():
        try:
            findings = check(subject)
        except Exception as error:  # whatever a library raises on a batch is a finding
            findings = Findings("raised", f"{type(error).__name__}: {error}")
        print(f"{subject.library} {subject.version}, {subject.name}: {name}: {findings.verdict} {findings.detail}")
        about = {"library": subject.library, "version": subject.version, "loss": subject.name, "property": name}
        rows.append(about | asdict(findings))
    return rows


if __name__ == "__main__":
    main()
