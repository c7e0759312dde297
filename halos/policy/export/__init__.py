"""The trained policy or reward model as a Hugging Face folder."""
