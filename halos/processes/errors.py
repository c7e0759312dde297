"""Failures whose cause is neither the configuration nor the data."""


class RunFailed(RuntimeError):
    """A run cannot go on for a reason outside of it, such as a full disk or a lost rank.

    The message is one line, and is printed without a traceback.
    """
