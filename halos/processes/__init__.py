"""Starting ranks, signals, collectives and sweeps."""
