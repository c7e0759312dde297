"""Draw the rewards and the KL of a run, as in the README.

python scripts/plot_run.py RUN rewards.png      (or .pdf, .svg)
"""

from __future__ import annotations

import argparse
from pathlib import Path

from halos.comparison.run_figure import run_figure
from halos.comparison.runs import read_runs
from halos.config.one_line import end_with_one_line


def draw(run: str, output: Path) -> None:
    """Draw one finished run.

    Raises:
        ValueError: the folder is no finished run, or the file's name ends in no format that can be written.
    """
    if output.suffix not in (".png", ".pdf", ".svg"):
        raise ValueError(f"output: expected a file that ends in .png, .pdf or .svg, found {output}")
    runs, _ = read_runs([run])
    if len(runs) != 1:
        raise ValueError(f"run: expected the folder of one finished run, found {len(runs)} in {run}")
    run_figure(runs[0].curves).savefig(output, dpi=100)
    print(f"rewards and KL: {output}")


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="the folder of a finished run")
    parser.add_argument("output", type=Path)
    options = parser.parse_args()
    end_with_one_line(lambda: draw(options.run, options.output))


if __name__ == "__main__":
    main()
