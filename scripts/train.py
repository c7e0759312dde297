"""Align a model: ``python scripts/train.py loss=kto strategy=ddp``."""

from halos.cli import main_command

if __name__ == "__main__":
    main_command("train")
