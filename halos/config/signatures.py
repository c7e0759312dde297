"""Checks the arguments of a call before it is made, to tell wrong arguments from errors inside the call."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from functools import partial


def check_arguments(name: str, function: Callable[..., object], /, *args: object, **kwargs: object) -> None:
    """Check that a function or class takes these arguments, without calling it.

    Args:
        name: what the error calls the function.
        function: a function, a class, or a ``functools.partial`` of one.
        args, kwargs: the arguments of the call.

    Raises:
        ValueError: unknown arguments; the error names them, the closest known names, and all known names.
    """
    if isinstance(function, partial):
        args, kwargs = (*function.args, *args), function.keywords | kwargs
        function = function.func
    accepted = accepted_names(function)
    if accepted is not None and (unknown := [key for key in kwargs if key not in accepted]):
        hints = ", ".join(f"{key!r}{did_you_mean(key, accepted)}" for key in unknown)
        raise ValueError(f"{name} does not take {hints}; expected some of {', '.join(accepted[len(args) :])}")
    try:
        signature = inspect.signature(function)
    except ValueError:
        return  # a type written in C that does not publish its signature
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        raise ValueError(f"{name} does not take these parameters: {error}") from error


def accepted_names(function: Callable[..., object]) -> list[str] | None:
    """The keywords that a function or a class takes; None if it takes any.

    A constructor that passes ``**options`` on to its base class takes that class's keywords too.
    """
    names: list[str] = []
    # Constructors of the class and its bases, in the order in which super() calls them.
    calls = [function]
    if isinstance(function, type):
        calls = [vars(base)["__init__"] for base in function.__mro__[:-1] if "__init__" in vars(base)]
    for call in calls:
        parameters = inspect.signature(call).parameters.values()
        names += [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            return [name for name in dict.fromkeys(names) if name != "self"]
    return None


def did_you_mean(name: str, names: Sequence[str]) -> str:
    """`` (did you mean …?)`` with the names that are close to a misspelt one, or an empty text."""
    # Upper and lower case count as equal: KTO matches kto.
    lowered = {other.lower(): other for other in names}
    close = [lowered[other] for other in get_close_matches(name.lower(), lowered, n=3, cutoff=0.5)]
    return f" (did you mean {' or '.join(close)}?)" if close else ""
