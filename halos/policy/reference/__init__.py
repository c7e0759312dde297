"""The reference's log-probs, computed before training and cached."""
