"""Training data that are read as they are needed."""
