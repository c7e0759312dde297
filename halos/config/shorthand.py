"""Groups that follow from other words: ``data.train=FILE`` implies ``data=files``, ``model.path=…`` ``model=hf``."""

from __future__ import annotations

from collections.abc import Sequence

IMPLIED = {"data.train": ("data", "files"), "model.path": ("model", "hf")}
"""From a key that only some options of a group have to the option that a user means by it."""


def implied_groups(words: Sequence[str]) -> list[str]:
    """Return the groups that the words of a command line imply and do not name.

    An experiment names its own groups, so nothing is implied beside one.

    Args:
        words: overrides, such as ``data.train=thumbs.csv``.

    Returns:
        Overrides, such as ``data=files``.
    """
    keys = {word.partition("=")[0].lstrip("+") for word in words}
    if "experiment" in keys:
        return []
    return [f"{group}={option}" for key, (group, option) in IMPLIED.items() if key in keys and group not in keys]
