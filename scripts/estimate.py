"""Estimate the memory and time of a run: ``python scripts/estimate.py experiment=zephyr_kto estimate.gpu=h100``."""

from halos.cli import main_command

if __name__ == "__main__":
    main_command("estimate")
