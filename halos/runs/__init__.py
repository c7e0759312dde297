"""What surrounds a training run: its folder, loggers, samples and what it prints."""
