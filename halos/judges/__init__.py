"""Judges of completions: a true reward, a reward model, or a chat model behind an OpenAI-compatible endpoint."""
