"""Look at feedback data and convert it: ``python scripts/data.py data=files data.train=train.csv view=binary``."""

from halos.cli import main_command

if __name__ == "__main__":
    main_command("data")
