"""Measure the reference points of KTO: ``python scripts/reference_points.py policy=out/run1``."""

from halos.cli import main_command

if __name__ == "__main__":
    main_command("reference-points")
