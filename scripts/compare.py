"""Compare runs: ``python scripts/compare.py runs=out/sweep output=out/comparison``."""

from halos.cli import main_command

if __name__ == "__main__":
    main_command("compare")
