"""Evaluate a policy: ``python scripts/evaluate.py policy=out/run1 judge=truth opponent=reference``."""

from halos.cli import main_command

if __name__ == "__main__":
    main_command("evaluate")
