"""Compute and cache the reference's log-probs: ``python scripts/cache_reference.py loss=kto``."""

from halos.cli import main_command

if __name__ == "__main__":
    main_command("cache-reference")
