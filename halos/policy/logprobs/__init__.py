"""Log-probs of completions, padded or packed."""
