"""Sample completions: ``python scripts/sample.py policy=out/run1 samples=4 output=samples.jsonl``."""

from halos.cli import main_command

if __name__ == "__main__":
    main_command("sample")
