"""Compute and cache the reference's log-probs: ``python scripts/cache_reference.py loss=kto trainer.devices=2 strategy=ddp``."""

from halos.cli import main_command

if __name__ == "__main__":
    main_command("cache-reference")
