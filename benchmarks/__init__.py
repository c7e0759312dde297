"""Speed and memory beside TRL's trainers and a plain PyTorch loop: ``python scripts/benchmark.py``."""
