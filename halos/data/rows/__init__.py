"""Token rows: one prompt and its completions as token ids."""
