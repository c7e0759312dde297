"""The training loop of an objective: its steps, denominators and metrics."""
