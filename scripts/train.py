"""Align a model: ``python scripts/train.py loss=kto strategy=ddp``."""

from halos.cli import main_train

if __name__ == "__main__":
    main_train()
