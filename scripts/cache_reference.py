"""The reference's log-probs alone: ``python scripts/cache_reference.py loss=kto trainer.devices=2 strategy=ddp``."""

from halos.cli import main_cache_reference

if __name__ == "__main__":
    main_cache_reference()
