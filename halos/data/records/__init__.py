"""Feedback records: one prompt with its completions and judgements."""
