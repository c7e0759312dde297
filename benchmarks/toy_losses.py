"""``python -m benchmarks.toy_losses [LOSS …]``: each loss on the toy world with three seeds, nothing else set.

The numbers are in ``benchmarks/results/toy_losses.json``, from which ``python scripts/write_docs.py`` fills the table
of docs/losses/index.md. Started again, it passes over the runs that are finished.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from halos.files import write_atomically
from scripts.pages.losses import TOY_RESULTS, needs, notes

SEEDS = "0,1,2"


def main(words: Sequence[str] | None = None) -> None:
    """Run the losses one after the other; the results are written after each."""
    made = argparse.ArgumentParser("benchmarks.toy_losses", description=__doc__)
    made.add_argument("losses", nargs="*", help="default: all")
    made.add_argument("--runs", type=Path, default=Path("out/toy_losses"))
    options = made.parse_args(words)
    # The toy world has no labels of steps.
    for loss in options.losses or [name for name in notes() if not needs(name).step_labels]:
        folder = options.runs / loss
        settings = [f"loss={loss}", f"seed={SEEDS}", f"output_dir={folder}", "resume=auto", "logger=none"]
        subprocess.run([sys.executable, "scripts/train.py", "-m", *settings], check=True)
        write(TOY_RESULTS, loss, folder)


def write(file: Path, loss: str, folder: Path) -> None:
    """Add a loss's runs to the results: ``{loss: {"desirable": %, "kl": nats, "reference": %}}``, a list of each.

    Of a reward model, which writes no replies: ``{"accuracy": %}`` of the held-out pairs.

    Args:
        file: the results, which need not exist yet.
        loss: the name of the loss.
        folder: has a folder for each run.
    """
    results = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    runs = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*/summary.json")]
    runs.sort(key=lambda run: run["seed"])
    if "samples" not in runs[0]:
        results[loss] = {"accuracy": [round(100 * run["metrics"]["rewards/accuracies"], 1) for run in runs]}
    else:
        results[loss] = {
            "desirable": [round(100 * run["samples"]["policy_desirable"], 1) for run in runs],
            "kl": [round(run["samples"]["kl"], 2) for run in runs],
            "reference": [round(100 * run["samples"]["reference_desirable"], 1) for run in runs],
        }
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
