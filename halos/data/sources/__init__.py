"""Where feedback comes from: one file a source."""
