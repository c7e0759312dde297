"""The Lightning half of an objective: its steps, denominators and metrics."""
