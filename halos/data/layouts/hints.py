"""Words of the command line that name columns, as errors recommend them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice

from halos.data.layouts.chats import is_chat
from halos.data.layouts.roles import Path, Roles
from halos.data.layouts.values import is_label, number_in
from halos.data.reading.fields import MAX_KEYS, RawRow, keys_of, wrong

LONGEST_NAME = 60
"""Characters of a column's name, or of a path, that errors recommend."""


def suggestion(row: RawRow) -> str:
    """Return words of the command line that may name the columns of a row that was not recognised."""
    leaves = dict(_leaves(row))
    texts = [path for path, value in leaves.items() if isinstance(value, list) or number_in(str(value)) is None]
    words = [path for path in texts if is_label(leaves[path])]
    texts = sorted((path for path in texts if path not in words), key=_telling)
    if len(texts) < 2:
        return "data.columns.prompt=… data.columns.completion=…"
    named = f"{column_word('prompt', texts[0])} {column_word('completion', texts[1])}"
    others = [path for path in leaves if path not in texts[:2]]
    label = words[0] if words else others[0] if len(others) == 1 and len(row) == 3 else None
    return named if label is None else f"{named} {column_word('label', label)}"


def column_word(role: str, *paths: Path) -> str:
    """Return the word of the command line that names the column of a role, as it is typed in a shell."""
    names = [path if len(path) <= LONGEST_NAME else "…" for path in paths[:MAX_KEYS]]
    value = f"[{','.join(names)}]" if role == "ignore" else names[0]
    word = f"data.columns.{role}={value}"
    return word if re.fullmatch(r"[\w.,=\[\]-]+", word) else shlex.quote(word)


def missing_prompt(where: str, row: RawRow, roles: Roles) -> ValueError:
    """Return the error for a row without a prompt, with the column that may be it."""
    if "prompt" in row and row["prompt"] is None:
        return wrong(where, "prompt", "given", None)
    used = {path for paths in roles.values() for path in ((paths,) if isinstance(paths, str) else paths)}
    texts = [path for path, value in _leaves(row) if path not in used and not isinstance(value, int | float)]
    nearest = column_word("prompt", min(texts, key=_telling, default="…"))
    return ValueError(f"{where}: expected the key 'prompt'; found {keys_of(row)}; name it with {nearest}")


def _leaves(value: object, path: str = "", depth: int = 0) -> Iterator[tuple[str, object]]:
    """Yield the values in a row that are texts, numbers or conversations, by their paths."""
    items: Iterable[tuple[object, object]] = ()
    if depth < 5 and isinstance(value, Mapping):
        items = value.items()
    elif depth < 5 and isinstance(value, list) and not is_chat(value):
        items = enumerate(value[:2])
    elif path and len(path) <= LONGEST_NAME and (isinstance(value, str | int | float) or is_chat(value)):
        yield path, value
    for key, item in islice(items, MAX_KEYS):
        yield from _leaves(item, f"{path}.{key}" if path else str(key), depth + 1)


def _telling(key: str) -> int:
    name = key.casefold()
    if any(word in name for word in ("quest", "prompt", "instr", "input", "query", "ask")):
        return 0
    return 1 if any(word in name for word in ("answer", "repl", "respon", "output", "complet", "text")) else 2
