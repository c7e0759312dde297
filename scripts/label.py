"""Turn samples into feedback: ``python scripts/label.py samples=samples.jsonl judge=chat judge.model=NAME``."""

from halos.cli import main_command

if __name__ == "__main__":
    main_command("label")
