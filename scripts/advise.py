"""Count feedback, and list the losses that fit it: ``python scripts/advise.py data.train=train.jsonl``."""

from halos.cli import main_command

if __name__ == "__main__":
    main_command("advise")
