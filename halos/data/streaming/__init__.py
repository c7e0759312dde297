"""Training data that are read while training, not prepared beforehand."""
