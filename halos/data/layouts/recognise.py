"""Recognises the layout of a row: the role of each of its columns.

A layout is recognised by the names of the columns and the kinds of their values, once for all rows that agree in both.
Roles that the user has declared come first; the other roles are found by name.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from halos.data.layouts.chats import conversation_in
from halos.data.layouts.hints import suggestion
from halos.data.layouts.roles import (
    ITEM_NAMES,
    LIST_NAMES,
    NAMES,
    PAIR_NAMES,
    VOTE_NAMES,
    Path,
    Roles,
    has_content,
    kind_of,
    value_at,
)
from halos.data.layouts.steps import step_keys
from halos.data.layouts.unused import first_item
from halos.data.layouts.values import graded_number, number_in
from halos.data.reading.fields import RawRow, keys_of

SIDE = re.compile(r"(?P<stem>.*?)_?(?P<end>[ab012])", re.IGNORECASE)
SIDE_STEMS = frozenset(
    [
        "output",
        "response",
        "answer",
        "completion",
        "conversation",
        "reply",
        "generation",
        "model_output",
        "candidate",
        "human_ref",
        "data.output",
        "data.response",
        "data.answer",
        "data.completion",
        "data.text",
    ]
)
"""Names of the two columns of a comparison, without their ends (:data:`SIDE_ENDS`), such as ``_a`` and ``_b``."""
SIDE_ENDS = (("a", "b"), ("0", "1"), ("1", "2"))
SIDE_SCORES = ("score", "reward")
HALOS_TYPES = {
    "binary_feedback": ("prompt", "completion"),
    "scalar_feedback": ("prompt", "completion"),
    "pairwise_feedback": ("prompt", "sides"),
}


def recognised(where: str, row: RawRow, declared: Roles, ignore: Sequence[str]) -> dict[str, Path | tuple[Path, ...]]:
    """Return the columns of a row by their roles.

    Args:
        where: the location of the row.
        row: the row.
        declared: the columns that the user has named, by role.
        ignore: columns that have no role.

    Raises:
        ValueError: there are no completions, or it is not clear which column holds the judgement.
    """
    finder = _Finder(row, declared, ignore)
    roles = finder.roles
    finder.find_completions(where)
    for role in ("prompt", "system", "history", "tools", "chat_template_kwargs", "weight", "id"):
        finder.find(role)
    if "chosen" in roles:
        for role in ("score_chosen", "score_rejected", "margin"):
            finder.find(role)
    if "prompt" not in roles and "messages" not in roles:
        finder.find("messages")
    if not {"prompt", "messages"} & set(roles):
        finder.find("prompt", ("input",))
    if "prompt" in roles:
        finder.find("input")
    return roles


class _Finder:
    """Finds the columns of roles. A column has at most one role."""

    def __init__(self, row: RawRow, declared: Roles, ignore: Sequence[str]) -> None:
        self.row = row
        self.roles: dict[str, Path | tuple[Path, ...]] = dict(declared)
        self.taken = {path for paths in declared.values() for path in ((paths,) if isinstance(paths, str) else paths)}
        self.taken.update(ignore)
        # Spreadsheets have "User input" where programs have user_input.
        self.by_name = {re.sub(r"[\s-]+", "_", key.strip()).casefold(): key for key in reversed(list(row))}

    def find(self, role: str, names: tuple[str, ...] = ()) -> bool:
        """Find the column of a role; return whether it has one."""
        if role not in self.roles:
            # Columns with content come first: a table of rows in several layouts has the columns of all layouts.
            candidates = [path for name in names or NAMES[role] if (path := self._path(name)) is not None]
            if role in ("prompt", "completion", "completions"):
                # An object such as WebGPT's question has parts, which have names of their own (question.full_text).
                candidates = [path for path in candidates if not _has_parts(value_at(self.row, path))]
            candidates.sort(key=lambda path: not has_content(value_at(self.row, path)))
            if candidates:
                self.roles[role] = candidates[0]
                self.taken.add(candidates[0])
        return role in self.roles

    def _path(self, name: str) -> Path | None:
        path = self.by_name.get(name, name if "." in name else None)
        if path is None or path in self.taken:
            return None
        return None if path not in self.row and value_at(self.row, path) is None else path

    def find_completions(self, where: str) -> None:
        """Find the columns of the completions and of the feedback on them.

        Raises:
            ValueError: there are no columns of completions.
        """
        halos_type = HALOS_TYPES.get(str(self.row.get("type")))
        if halos_type is not None:
            self._halos(halos_type[1])
            return
        declared = kind_of(self.roles)
        if declared != "messages" or "rejected" in self.roles:
            single = dict.fromkeys(("completion", "steps"), self._single)
            layouts = {"completions": self._list, "sides": self._sides, **single}
            layouts.get(declared, self._pair)(False)
            return
        # Columns with content first: a table of rows in several layouts has empty columns for the other layouts.
        for filled in (True, False):
            for layout in (self._list, self._sides, self._named_pair, self._pair, self._single, self._conversation):
                if layout(filled):
                    return
        raise ValueError(
            f"{where}: expected 'prompt' with 'completions', 'chosen' and 'rejected', 'completion', 'output', or "
            f"'output_A' and 'output_B', or else 'messages'; found {keys_of(self.row)}; "
            f"name the columns: {suggestion(self.row)}"
        )

    def _halos(self, kind: str) -> None:
        if kind == "sides":
            self.roles.update(sides=("output_A", "output_B"), scores=("reward_A", "reward_B"), winner="label")
        else:
            self.roles.update(completion="output", score="reward")
            if self.row["type"] == "binary_feedback" or "label" in self.row:
                self.roles["label"] = "label"

    def _is_filled(self, role: str, filled: bool) -> bool:
        path = self.roles.get(role)
        return isinstance(path, str) and (not filled or has_content(value_at(self.row, path)))

    def _found(self, role: str, filled: bool) -> bool:
        """Find a column for a role. With ``filled``, a column that is empty in this row does not count."""
        declared = role in self.roles
        if self.find(role) and (declared or self._is_filled(role, filled)):
            return True
        if not declared and (path := self.roles.pop(role, None)):
            self.taken.discard(str(path))
        return False

    def _list(self, filled: bool) -> bool:
        outputs = self.row.get("output") if "output" not in self.taken else None
        # A ranking of LLaMA-Factory: texts, the best first. A list of messages is one completion.
        if isinstance(outputs, list) and outputs and all(isinstance(text, str) for text in outputs):
            self.roles.setdefault("completions", "output")
            self.taken.add("output")
        declared = "completions" in self.roles
        if not self._found("completions", filled):
            return False
        first = first_item(self.row, self.roles)
        if isinstance(first, dict) and not declared and not {*ITEM_NAMES["text"], "messages"} & set(first):
            self.taken.discard(str(self.roles.pop("completions")))
            return False
        self.find("preferences")
        if isinstance(first, str) and self.roles["completions"] != "output":
            for role, names in LIST_NAMES.items():
                self.find(role, names)
        if isinstance(first, dict):
            for role, names in ITEM_NAMES.items():
                if role not in self.roles and (name := next((name for name in names if name in first), None)):
                    self.roles[role] = name
        return True

    def _sides(self, filled: bool) -> bool:
        if "sides" not in self.roles:
            pairs = [pair for stem in self._stems() if (pair := self._pair_of(stem))]
            columns = next((p for p in pairs if not filled or any(has_content(value_at(self.row, s)) for s in p)), None)
            if columns is None:
                return False
            self.roles["sides"] = columns
            self.taken.update(columns)
        sides = self.roles["sides"]
        if "scores" not in self.roles:
            ends = [re.sub(r".*?([ab012])$", r"\1", side, flags=re.IGNORECASE) for side in sides]
            for stem in SIDE_SCORES:
                scores = tuple(self.by_name.get(f"{stem}_{end.casefold()}", "") for end in ends)
                if all(scores):
                    self.roles["scores"] = scores
                    self.taken.update(scores)
                    break
        if "winner" not in self.roles and {"winner_model_a", "winner_model_b"} <= set(self.row):
            tie = ("winner_tie",) if "winner_tie" in self.row else ()
            self.roles["winner"] = ("winner_model_a", "winner_model_b", *tie)
        self.find("winner", (*NAMES["winner"], "label", "labels"))
        return True

    def _stems(self) -> list[str]:
        nested = [f"data.{key}" for key in data] if isinstance(data := self.row.get("data"), dict) else []
        stems = [match["stem"].casefold() for key in [*self.row, *nested] if (match := SIDE.fullmatch(key))]
        return [stem for stem in dict.fromkeys(stems) if stem in SIDE_STEMS]

    def _pair_of(self, stem: str) -> tuple[str, str] | None:
        for ends in SIDE_ENDS:
            for separator in ("_", ""):
                names = [f"{stem}{separator}{end}" for end in ends]
                paths = [path for name in names if (path := self._path(name)) is not None]
                if len(paths) == 2:
                    return paths[0], paths[1]
        return None

    def _pair(self, filled: bool) -> bool:
        has_pair = self._found("chosen", filled) | self._found("rejected", filled)
        if has_pair:  # if only one was found, the reader of pairs raises an error that explains it
            self.roles.setdefault("chosen", "chosen")
            self.roles.setdefault("rejected", "rejected")
        return has_pair

    def _named_pair(self, filled: bool) -> bool:
        if {"chosen", "rejected"} <= set(self.row):
            return False
        for names in PAIR_NAMES:
            paths = [path for name in names if (path := self._path(name)) is not None]
            if len(paths) == 2 and all(_may_be_reply(value_at(self.row, path)) for path in paths):
                self.roles |= zip(("chosen", "rejected"), paths, strict=True)
                self.taken.update(paths)
                return True
        return False

    def _single(self, filled: bool) -> bool:
        # The steps of a reply may be given in addition to the reply, or instead of it.
        has_steps = self._has_steps()
        if not self._found("completion", filled) and not has_steps:
            return False
        self._find_judgement()
        return True

    def _has_steps(self) -> bool:
        path = self._path("steps")
        return "steps" in self.roles or (
            path is not None and step_keys(value_at(self.row, path)) is not None and self.find("steps")
        )

    def _conversation(self, filled: bool) -> bool:
        text = self.row.get("text")
        if "messages" not in self.roles and isinstance(text, str) and conversation_in(text):
            self.find("messages", ("text",))
        if not self._found("messages", filled):
            return False
        self._find_judgement()
        return True

    def _find_judgement(self) -> None:
        for role in ("label", "score"):
            self.find(role)
        rating = self.roles.get("score")
        value = value_at(self.row, rating) if isinstance(rating, str) else None
        if "label" not in self.roles and isinstance(value, str) and value.strip() and graded_number(value) is None:
            self.roles["label"] = self.roles.pop("score")  # a rating in words
        if "label" not in self.roles and not self.find("votes"):  # votes are used only without a label
            pairs = (tuple(self.by_name.get(name, "") for name in names) for names in VOTE_NAMES)
            counts = next((pair for pair in pairs if all(pair) and not self.taken.intersection(pair)), None)
            if counts:
                self.roles["votes"] = counts
                self.taken.update(counts)


def _has_parts(value: object) -> bool:
    """Return whether a value is an object other than a message."""
    return isinstance(value, dict) and not {"role", "from"} & set(value)


def _may_be_reply(value: object) -> bool:
    return has_content(value) and (isinstance(value, list) or (isinstance(value, str) and number_in(value) is None))
