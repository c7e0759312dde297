"""Parses answers of a chat endpoint, which may be anything: too long, too deeply nested, not JSON, with NaN counts."""

from __future__ import annotations

import json
import re
import time
from dataclasses import dataclass
from email.utils import parsedate_to_datetime

from halos.checks import is_number

MAX_BYTES = 1 << 22
"""The longest answer; a reply of 64,000 tokens has less than a tenth of it."""
MAX_DEPTH = 64
"""The deepest nesting of objects and arrays; a chat completion has about five levels."""
MAX_TOKENS = 10**9
"""The largest count of tokens that is accepted for one answer."""
# Possessive quantifiers and an optional end: a string without an end is matched in one pass, without backtracking.
_STRING_OR_BRACKET = re.compile(r'"(?:[^"\\]++|\\.)*+"?|([\[{])|([\]}])', re.DOTALL)


class BadAnswer(Exception):
    """The answer is not a chat completion."""


@dataclass(frozen=True, slots=True)
class Answer:
    """The text of an answer, and the tokens that it cost."""

    text: str
    prompt_tokens: int = 0
    completion_tokens: int = 0


def parse_answer(data: bytes) -> Answer:
    """Read the body of a chat completion.

    Raises:
        BadAnswer: the body is not a chat completion.
    """
    try:
        body = data.decode("utf-8-sig")
        _check_depth(body)
        answer = json.loads(body)
        text = answer["choices"][0]["message"]["content"]
        usage = answer.get("usage") or {}
        tokens = [_tokens(usage.get(name)) for name in ("prompt_tokens", "completion_tokens")]
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        raise BadAnswer("an answer that is not a chat completion") from None
    # A refusal has its text in another field and null here.
    return Answer(_encodable(text) if isinstance(text, str) else "", *tokens)


def retry_after(header: str) -> float | None:
    """The seconds that a ``Retry-After`` header asks for, as a number or as an HTTP date; None where it is neither."""
    if re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", header):
        return float(header)
    try:
        return max(0.0, parsedate_to_datetime(header[:64]).timestamp() - time.time())
    except (ValueError, TypeError, IndexError, OverflowError):
        return None


def _check_depth(body: str) -> None:
    # Checked before parsing: json recurses for each level, and how deep Python allows that depends on the call stack.
    depth = 0
    for token in _STRING_OR_BRACKET.finditer(body):
        depth += (token[1] is not None) - (token[2] is not None)
        if depth > MAX_DEPTH:
            raise ValueError("too deep")


def _tokens(value: object) -> int:
    if value is None:
        return 0
    # JSON has numbers that are infinite in Python (1e999), and Python's json reads NaN.
    if not (is_number(value) and 0 <= value <= MAX_TOKENS):
        raise ValueError("no number of tokens")
    return int(value)


def _encodable(text: str) -> str:
    # JSON can contain half of a surrogate pair, which cannot be written as UTF-8.
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
