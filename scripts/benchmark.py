"""Measure speed and memory next to TRL and a plain PyTorch loop: ``python scripts/benchmark.py --help``."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # benchmarks/ is in the checkout, not in the wheel

from benchmarks.command import main
from halos.config.one_line import end_with_one_line

if __name__ == "__main__":
    end_with_one_line(main)
