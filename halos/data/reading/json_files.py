"""JSON lines and JSON: strict, one row at a time, each with its location.

Neither reader holds more than the text that is being parsed and one row. That text is one line of a .jsonl file, and
the whole of a .json file.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from json.decoder import WHITESPACE  # type: ignore[attr-defined]
from pathlib import Path

from halos.data.reading.fields import check_depth, shorten
from halos.data.reading.lines import USUAL, decode, lines

Located = tuple[str, dict[str, object]]
"""The location of a row (``train.jsonl:12``) and the row."""
ERRORS = (ValueError, RecursionError, MemoryError)
"""What the parser raises."""


class MalformedRow(dict[str, object]):
    """An empty row in place of a line that is not a JSON object.

    Args:
        error: the error about the line.
    """

    def __init__(self, error: ValueError) -> None:
        super().__init__()
        self.error = error


def malformed(where: str, error: ValueError, keep: bool) -> Located:
    """Return a malformed row for an error, or raise the error unless malformed rows are kept."""
    if not keep:
        raise error
    return where, MalformedRow(error)


def read_jsonl(
    file: Path,
    start: int = 0,
    stop: int | None = None,
    number: int = 1,
    *,
    expansion: int = USUAL.max_expansion,
    keep_malformed: bool = False,
) -> Iterator[Located]:
    """Yield the objects of a file that has one in each line, located by line; blank lines are skipped.

    Args:
        file: the file.
        start: byte of a plain file at which reading begins.
        stop: byte at which it ends; None: the end of the file.
        number: the number of the line that begins at ``start``.
        expansion: see :class:`.ReadingLimits`.
        keep_malformed: yield a :class:`MalformedRow` for a malformed line, which is an error otherwise.
    """
    number -= 1
    # A line may be gigabytes: enumerate would keep it while its text is parsed, and so would the name ``line``.
    for line in lines(file, start, stop, number + 1, expansion=expansion):
        number += 1
        where = f"{file}:{number}"
        text = decode(where, line)
        del line
        if text.strip():
            try:
                located = _row_of_line(where, text, number)
            except ValueError as error:
                located = malformed(where, error, keep_malformed)
            yield located


def _row_of_line(where: str, text: str, number: int) -> Located:
    hint = ""
    if number == 1 and text.lstrip()[0] == "[":
        hint = "; one list of objects is .json, rename the file"
    elif number == 1 and text.strip() == "{":
        hint = "; one object a line is .jsonl, and this object goes over several: rename the file"
    try:
        value = _decode(text)
    except ERRORS as error:
        raise _explanation(error, where, hint) from None
    return _as_row(where, value, hint)


def read_json(file: Path, *, expansion: int = USUAL.max_expansion, keep_malformed: bool = False) -> Iterator[Located]:
    """Yield the objects of a list, located by number; the list may be the only value of an object around it.

    Args:
        file: the file.
        expansion: see :class:`halos.data.reading.lines.ReadingLimits`.
        keep_malformed: yield a :class:`MalformedRow` for an item that is not an object; false: raise an error.
    """
    text = _all_text(file, expansion)
    if not text.strip():
        return
    start = _skip(text, 0)
    # A list is parsed item by item. An object has to be parsed whole, as only its end tells whether the list is its
    # only value.
    if text[start] == "[":
        for number, item in enumerate(_items(file, text, start + 1), start=1):
            yield _as_row(f"{file}[{number}]", item, keep_malformed=keep_malformed)
        return
    with _explained(file):
        value = _decode(text)
    del text
    if isinstance(value, dict) and len(value) == 1:
        (value,) = value.values()
    if not isinstance(value, list):
        raise ValueError(f"{file}: expected a list of objects [{{...}}, ...], found {_kind(value)}")
    for number, item in enumerate(value, start=1):
        yield _as_row(f"{file}[{number}]", item, keep_malformed=keep_malformed)


def parse_json(where: str, text: str) -> object:
    """Parse strict JSON; raise ``ValueError`` that begins with ``where`` for other text."""
    try:
        return _decode(text)
    except ERRORS as error:
        raise _explanation(error, where) from None


def _decode(text: str) -> object:
    value: object = DECODER.decode(text)
    check_depth(value, text)
    return value


def _all_text(file: Path, expansion: int) -> str:
    content = b"".join(lines(file, longest=None, expansion=expansion))
    try:
        return content.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        start = content.rfind(b"\n", 0, error.start) + 1
        end = content.find(b"\n", error.start)
        number = content.count(b"\n", 0, error.start) + 1
        return decode(f"{file}:{number}", content[start : None if end < 0 else end])  # raises, naming line and position


def _items(file: Path, text: str, position: int) -> Iterator[object]:
    """Yield the items of the list that begins before ``position``, parsed one by one.

    Parsed at once, the objects of a list would take several times the memory of its text.
    """
    position = _skip(text, position)
    closed = text.startswith("]", position)
    while not closed:
        with _explained(file):
            begin = position
            item, position = DECODER.raw_decode(text, begin)
            check_depth(item, text, begin, position)
            position = _skip(text, position)
            closed = text.startswith("]", position)
            if not closed and not text.startswith(",", position):
                raise json.JSONDecodeError("Expecting ',' delimiter", text, position)
        position = position if closed else _skip(text, position + 1)
        yield item
    with _explained(file):
        if _skip(text, position + 1) != len(text):
            raise json.JSONDecodeError("Extra data", text, _skip(text, position + 1))


def _skip(text: str, position: int) -> int:
    """Return the position after the white space at ``position``."""
    match = WHITESPACE.match(text, position)
    return match.end() if match else position


@contextmanager
def _explained(file: Path) -> Iterator[None]:
    """Raise errors of the parser with the line of the file."""
    try:
        yield
    except ERRORS as error:
        raise _explanation(error, str(file), many_lines=True) from None


def _explanation(error: Exception, where: str, hint: str = "", *, many_lines: bool = False) -> ValueError:
    """Return an error of the parser with its location; with ``many_lines``, that of the line in the file ``where``."""
    if isinstance(error, json.JSONDecodeError):
        if many_lines:
            where = f"{where}:{error.lineno}"
            hint = "; one object a line is .jsonl, rename the file" if error.msg == "Extra data" else ""
        return ValueError(f"{where}: expected JSON, found an error at column {error.colno}: {error.msg}{hint}")
    if isinstance(error, RecursionError):
        return ValueError(f"{where}: expected rows of plain fields, found JSON that is nested too deeply")
    if isinstance(error, MemoryError):
        return ValueError(f"{where}: expected rows that fit into memory, found one that does not")
    # JSONDecodeError is a ValueError; others come from _refuse_constant, _unique_keys and huge integers.
    return ValueError(f"{where}: expected JSON, found {error}")


def _refuse_constant(constant: str) -> None:
    raise ValueError(f"{constant}, which JSON does not have; use a number or null")


def _unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    # Python's parser keeps the last of two equal keys: half of what somebody wrote would be lost.
    row = dict(pairs)
    if len(row) < len(pairs):
        seen: set[str] = set()
        key = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {shorten(key)} twice in one object")
    return row


DECODER = json.JSONDecoder(parse_constant=_refuse_constant, object_pairs_hook=_unique_keys)


def _as_row(where: str, value: object, hint: str = "", *, keep_malformed: bool = False) -> Located:
    if isinstance(value, dict):
        return where, value
    error = ValueError(f"{where}: expected an object {{...}}, found {_kind(value)}{hint}")
    return malformed(where, error, keep_malformed)


def _kind(value: object) -> str:
    names = {list: "a list", dict: "an object", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
