"""Failures that are nobody's mistake in the configuration or the data."""


class RunFailed(RuntimeError):
    """A run cannot go on for a reason outside of it, such as a full disk or a lost rank; the message is one line."""
