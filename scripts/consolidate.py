"""Make one checkpoint file of a sharded folder: ``python scripts/consolidate.py FOLDER FILE``."""

from halos.sharding.consolidate import main

if __name__ == "__main__":
    main()
