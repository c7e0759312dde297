"""Groups that follow from other words: ``data.train=FILE`` implies ``data=files``, ``model.path=…`` ``model=hf``."""

from __future__ import annotations

from collections.abc import Sequence

IMPLIED = {"data.train": ("data", "files"), "model.path": ("model", "hf")}
"""For keys that only some options of a group have, the option that a user means by the key."""
OWN_SOURCE = "data.source._target_"
"""The key of a user's own source, which takes the keys of all file sources, not those of ``data=files``."""


def implied_groups(words: Sequence[str]) -> list[str]:
    """Return the groups that the words of a command line imply and do not name.

    An experiment names its own groups, so with an experiment nothing is implied.

    Args:
        words: overrides, such as ``data.train=thumbs.csv``.

    Returns:
        Overrides, such as ``data=files``.
    """
    keys = _keys(words)
    if "experiment" in keys:
        return []
    named = keys | ({"data"} if OWN_SOURCE in keys else set())
    return [f"{group}={option}" for key, (group, option) in IMPLIED.items() if key in keys and group not in named]


def own_source(words: Sequence[str]) -> list[str]:
    """Return the group of data that a source of the user's own implies, if none is named."""
    keys = _keys(words)
    return ["data=file_source"] if OWN_SOURCE in keys and not {"data", "experiment"} & keys else []


def _keys(words: Sequence[str]) -> set[str]:
    return {word.partition("=")[0].lstrip("+") for word in words}
