"""Turn samples into feedback: ``python scripts/label.py data=json data.train=samples.jsonl judge=chat``."""

from halos.cli import main_command

if __name__ == "__main__":
    main_command("label")
