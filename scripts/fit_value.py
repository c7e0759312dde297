"""Fit the value function of the people behind feedback: ``python scripts/fit_value.py policy=out/run1``."""

from halos.cli import main_command

if __name__ == "__main__":
    main_command("fit-value")
