"""Make a model folder of a run's checkpoint: ``python scripts/export.py run=out/run1``."""

from halos.cli import main_command

if __name__ == "__main__":
    main_command("export")
