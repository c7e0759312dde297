"""The Trainer, checkpoints, the run folder and the end of a run."""
