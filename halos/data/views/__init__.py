"""What an objective takes, derived from records."""
