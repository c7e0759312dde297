"""The columns of a row that play no role, and those of them that may not be left out in silence."""

from __future__ import annotations

import re
from collections.abc import Sequence

from halos.data.layouts.chats import is_chat
from halos.data.layouts.roles import ITEM_NAMES, Roles, column_of, has_content, value_at
from halos.data.layouts.values import is_label, number_in
from halos.data.reading.fields import RawRow

CONTENT = re.compile(
    r"system.*|inputs?|history|contexts?|documents?|passages?|images?|pictures?|videos?|audios?|tools|functions"
    r"|winner.*|rejected_.*|chosen_.*|weight|margin|votes|instruction|question|query",
    re.IGNORECASE,
)
"""Columns that can carry content or judgement: they are used, or ignored by name, or refused."""
JUDGEMENT = re.compile(
    r"feedback.*|reactions?|ratings?|thumbs?|annotations?|responses|labels?|best.*|preferred.*", re.IGNORECASE
)
"""Columns that can carry a judgement: they are refused where none was recognised."""
NO_CONTENT = re.compile(r".*_(id|ids|model|name|source|tokens|length|len|url|logprob|avg_logprob|hash)", re.IGNORECASE)
NO_SCORE = re.compile(
    r"(.*_)?(id|ids|index|idx|row|turn|turns|num|number|count|length|len|tokens|time|timestamp|date|year|created|"
    r"created_at|updated_at|seed|version|split|temperature|hash|ts|tstamp)",
    re.IGNORECASE,
)


def first_item(row: RawRow, roles: Roles) -> object:
    """Return the first item of a row's list of completions, None where there is none."""
    path = roles.get("completions")
    items = value_at(row, path) if isinstance(path, str) else None
    return items[0] if isinstance(items, list) and items else None


def unclear_judgement(row: RawRow, roles: Roles, ignore: Sequence[str]) -> list[str]:
    """Return the columns of numbers that may be the judgement of a completion for which none was recognised."""
    if not {"completion", "messages"} & set(roles) or {"label", "score", "votes", "chosen", "sides", "steps"} & set(
        roles
    ):
        return []
    used = used_columns(row, roles)
    return [
        key
        for key, value in row.items()
        if key not in used and key not in ignore and not NO_SCORE.fullmatch(key) and _may_be_score(value)
    ]


def _may_be_score(value: object) -> bool:
    return isinstance(value, int | float) or (isinstance(value, str) and number_in(value) is not None)


def used_columns(row: RawRow, roles: Roles) -> dict[str, str]:
    """Return the role of each column that plays one."""
    used = {}
    of_items = "completions" in roles and not isinstance(first_item(row, roles), str)
    for role, paths in roles.items():
        for path in (paths,) if isinstance(paths, str) else paths:
            if role not in ITEM_NAMES or not of_items:
                used[column_of(row, path)] = role
    return used


def refused_columns(row: RawRow, roles: Roles, ignore: Sequence[str]) -> list[str]:
    """Return the columns that can carry content or judgement and play no role."""
    used = used_columns(row, roles)
    # The conversation next to its own sides, as in binarized UltraFeedback, repeats them.
    repeats = "chosen" in roles or "sides" in roles
    judged = bool({"label", "score", "votes", "chosen", "sides", "rank", "preferences", "winner"} & set(roles))
    return [
        key
        for key, value in row.items()
        if key not in used
        and key not in ignore
        and has_content(value)
        and (
            _by_name(key)
            or (is_chat(value) and not repeats)
            or (key == "text" and not _repeats_reply(row, roles))
            or (not judged and JUDGEMENT.fullmatch(key.strip()))
        )
    ]


def _repeats_reply(row: RawRow, roles: Roles) -> bool:
    """Return whether the column ``text`` can be ignored: no other column is a text reply, or it contains that reply."""
    path, text = roles.get("completion"), row["text"]
    reply = value_at(row, path) if isinstance(path, str) else None
    return not isinstance(reply, str) or not isinstance(text, str) or reply in text


def role_of_refused(key: str, row: RawRow) -> str:
    """Return the role that a refused column probably plays."""
    if re.match("winner|best|preferred", key, re.IGNORECASE):
        return "winner"
    if not JUDGEMENT.fullmatch(key.strip()):
        return "completion" if key == "text" else "input"
    return "score" if _may_be_score(row[key]) and not is_label(row[key]) else "label"


def _by_name(key: str) -> bool:
    return CONTENT.fullmatch(key.strip()) is not None and NO_CONTENT.fullmatch(key.strip()) is None
