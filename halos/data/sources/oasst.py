"""OpenAssistant's conversation trees: the ranks of sibling replies (0 is the best) become preferences.

Both of its forms are read. The hub's Parquet files have one message in each row (``message_id``, ``parent_id``,
``role``, ``text``, ``rank``); their trees are assembled from the whole file. The other form has one tree in each row
(``prompt`` with nested ``replies``).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import final

from halos.data.reading.fields import RawRow, has, required, text_of, wrong
from halos.data.reading.json_files import Located
from halos.data.records.adapted import FILTERED, Adapted, by_rank, without_empty
from halos.data.records.record import Completion, Message, Record
from halos.data.sources.file_source import Columns, Files, FileSource

_SPEAKERS = {"prompter": "user", "assistant": "assistant"}


@dataclass(slots=True)
class _Node:
    where: str
    role: str
    text: str
    rank: int | None
    lang: str | None
    usable: bool
    replies: list[_Node] = field(default_factory=list)


def is_tree(row: RawRow) -> bool:
    """Return whether a row has a tree: a prompt with nested replies."""
    prompt = row.get("prompt")
    return isinstance(prompt, dict) and "replies" in prompt


def tree_records(where: str, row: RawRow) -> Iterator[Adapted]:
    """Make the records of a row that has a tree; see :meth:`OasstSource.adapted`."""
    prompt = row["prompt"]
    assert isinstance(prompt, dict)
    return _records(_tree(f"{where}/prompt", prompt), None)


def _node(where: str, row: RawRow) -> _Node:
    role, rank = required(where, row, "role"), row.get("rank")
    if not isinstance(role, str) or role not in _SPEAKERS:
        raise wrong(where, "role", f"one of {', '.join(_SPEAKERS)}", role)
    if isinstance(rank, float) and rank.is_integer():
        # Parquet files often store integers with gaps as floats.
        rank = int(rank)
    if rank is not None and type(rank) is not int:
        raise wrong(where, "rank", "a whole number, 0 for the best", rank)
    lang, usable = row.get("lang"), not row.get("deleted") and row.get("review_result") is not False
    text = text_of(where, "text", required(where, row, "text"))
    return _Node(where, _SPEAKERS[role], text, rank, None if lang is None else text_of(where, "lang", lang), usable)


def _tree(where: str, message: RawRow) -> _Node:
    """Return the node of a message with all replies below it."""
    root = _node(where, message)
    # Not recursion: a tree may be deeper than Python's stack.
    waiting = [(root, message)]
    while waiting:
        node, message = waiting.pop()
        replies = message.get("replies") or []
        if not isinstance(replies, list):
            raise wrong(node.where, "replies", "a list of messages", replies)
        for n, reply in enumerate(replies):
            place = f"{node.where.removesuffix('/prompt')}/{n}"
            if not isinstance(reply, dict):
                raise wrong(place, "replies", "messages with 'role' and 'text'", reply)
            node.replies.append(_node(place, reply))
            waiting.append((node.replies[-1], reply))
    return root


def _records(root: _Node, lang: str | None) -> Iterator[Adapted]:
    if lang is not None and root.lang != lang:
        yield root.where, None, Counter({f"{FILTERED}trees in another language than {lang}": 1})
        return
    waiting: list[tuple[_Node, tuple[Message, ...]]] = [(root, ())]
    while waiting:
        node, before = waiting.pop()
        if not node.usable:
            yield node.where, None, Counter({"deleted message": 1})
            continue
        turns = (*before, Message(node.role, node.text))
        if node.role == "user":
            yield _record(node, turns)
        waiting += [(reply, turns) for reply in reversed(node.replies)]


def _record(node: _Node, turns: tuple[Message, ...]) -> Adapted:
    dropped: Counter[str] = Counter()
    replies = [reply for reply in node.replies if reply.usable and reply.role == "assistant"]
    if not replies:
        return node.where, None, Counter({"prompt without a reply": 1})
    if not any(turn.content.strip() for turn in turns):
        return node.where, None, Counter({"empty prompt": 1})
    preferences = by_rank([reply.rank for reply in replies])
    record = Record(node.where, turns, tuple(Completion(reply.text) for reply in replies), preferences)
    return node.where, without_empty(record, dropped), dropped


@final
class OasstSource(FileSource):
    """Conversation trees in the formats of ``OpenAssistant/oasst1``.

    Args:
        train: files of training data.
        val: files of validation data.
        columns: renames keys, see :class:`.FileSource`.
        lang: only trees whose first message is in this language are used; None: all.
        bad_rows, max_bad_rows: see :class:`.FileSource`.
    """

    name = "oasst"
    whole_trees = True

    def __init__(
        self,
        train: Files | None = "OpenAssistant/oasst1:train",
        val: Files | None = None,
        columns: Columns = None,
        lang: str | None = "en",
        bad_rows: str = "stop",
        max_bad_rows: int = 100,
    ) -> None:
        super().__init__(train, val, columns, bad_rows, max_bad_rows)
        self._lang = lang

    def adapted(self, rows: Iterable[Located]) -> Iterator[Adapted]:
        """Make one record for each message of a prompter that has replies, whose prompt is the turns up to it.

        A deleted message is left out with all replies below it. A message whose parent is missing is counted.
        """
        nodes: dict[str, _Node] = {}
        replies: dict[str, list[_Node]] = defaultdict(list)
        roots: list[_Node] = []

        def add(where: str, row: RawRow) -> Iterable[Adapted]:
            prompt = row.get("prompt")
            if isinstance(prompt, dict):
                return _records(_tree(f"{where}/prompt", prompt), self._lang)
            name = text_of(where, "message_id", required(where, row, "message_id"))
            if before := nodes.get(name):
                raise ValueError(f"{where}: expected message ids to be unique; found {name!r}, as at {before.where}")
            node = _node(where, row)
            parent = text_of(where, "parent_id", row["parent_id"]) if has(row, "parent_id") else None
            node.replies = replies[name]
            nodes[name] = node
            (roots if parent is None else replies[parent]).append(node)
            return ()

        yield from self.each_row(rows, add)
        # Parents may come after their replies, so trees are complete once all messages are read. What cannot be reached
        # from a root has lost its parent, or is part of a loop, which is never entered here.
        reached, waiting = set(), list(roots)
        while waiting:
            node = waiting.pop()
            reached.add(node.where)
            waiting += node.replies
        for root in roots:
            yield from _records(root, self._lang)
        lost = (node.where for node in nodes.values() if node.where not in reached)
        yield from ((where, None, Counter({"message whose parent is missing": 1})) for where in lost)

    def adapted_one_by_one(self, rows: Iterable[Located]) -> Iterator[Adapted]:
        for where, row in rows:
            if not isinstance(row.get("prompt"), dict):
                raise ValueError(
                    f"{where}: expected one tree a row ('prompt' with nested 'replies') with data.streaming=true, "
                    "found one message a row, whose trees need the whole file"
                )
            yield from self.adapted([(where, row)])
