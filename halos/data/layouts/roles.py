"""Roles of columns: what a user declares, what is recognised by name, and the values that a role finds in a row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from halos.data.layouts.values import Values
from halos.data.layouts.votes import VoteRule
from halos.data.reading.fields import RawRow, keys_of

Path = str
"""A column, or a dotted path into one: ``input.messages``, ``preferred_output.0.content``."""
Roles = Mapping[str, "Path | tuple[Path, ...]"]
"""From a role to the column, or columns, that play it."""

NAMES: dict[str, tuple[str, ...]] = {
    "prompt": (
        "prompt", "question", "instruction", "query", "user_input", "user_prompt", "user_message", "user_query",
        "problem", "user", "question.full_text", "data.prompt", "data.question", "data.instruction",
    ),
    "system": ("system", "system_prompt", "system_message"),
    "input": ("input",),
    "history": ("history",),
    "messages": (
        "messages", "conversations", "conversation", "input.messages", "chat", "dialogue", "transcript",
        "request.messages", "inputs.messages",
    ),
    "completion": (
        "completion", "output", "response", "answer", "reply", "generation", "model_output", "model_response",
        "assistant", "data.response", "data.answer", "data.completion", "response.choices.0.message", "outputs.message",
    ),
    "chosen": ("chosen", "chosen_response", "preferred_output", "preferred", "chosen_answer"),
    "rejected": ("rejected", "rejected_response", "non_preferred_output", "dispreferred", "rejected_answer"),
    "completions": ("completions", "answers", "responses", "candidates", "outputs"),
    "label": (
        "label", "labels", "kto_tag", "desirable", "thumb", "thumbs", "feedback", "vote", "liked", "is_good",
        "is_desirable",
    ),
    "score": ("score", "reward", "stars", "star_rating", "rating", "overall_score"),
    "rank": ("rank",),
    "votes": ("votes",),
    "steps": ("steps",),
    "weight": ("weight", "sample_weight"),
    "margin": ("margin",),
    "score_chosen": ("score_chosen", "chosen_score"),
    "score_rejected": ("score_rejected", "rejected_score"),
    "winner": ("winner", "better_response_id", "preference", "preferred_side", "choice"),
    "tools": ("tools", "input.tools"),
    "chat_template_kwargs": ("chat_template_kwargs",),
    "preferences": ("preferences",),
    "id": ("id",),
}  # fmt: skip
"""The names by which the column of a role is recognised, the most telling first."""
PAIR_NAMES = (
    *(("accepted", "rejected"), ("better", "worse"), ("positive", "negative"), ("pos", "neg"), ("good", "bad")),
    *(("win", "lose"), ("winner", "loser"), ("y_w", "y_l"), ("response_chosen", "response_rejected")),
    *((f"chosen_{what}", f"rejected_{what}") for what in ("output", "text", "completion", "reply", "message")),
)
"""Further pairs of columns for the better and the worse completion; one alone may mean something else."""
VOTE_NAMES = (("upvotes", "downvotes"), ("up_votes", "down_votes"), ("thumbs_up", "thumbs_down"), ("likes", "dislikes"))
"""Pairs of columns that count the votes for and against a completion."""
ITEM_NAMES: dict[str, tuple[str, ...]] = {
    "text": ("text", "answer", "response", "completion", "content", "output", "generation"),
    "score": ("score", "reward", "rating", "overall_score"),
    "rank": ("rank", "ranking"),
    "label": ("desirable", "label"),
}
"""The same for the items of a list of completions."""
LIST_NAMES: dict[str, tuple[str, ...]] = {
    "score": ("scores", "rewards", "ratings"),
    "rank": ("ranks", "rankings", "ranking"),
    "label": ("labels",),
}
"""Names of columns with a list that says something of each completion in a list of texts."""
COMMON_ROLES = (
    "prompt",
    "messages",
    "system",
    "input",
    "history",
    "tools",
    "chat_template_kwargs",
    "weight",
    "margin",
    "id",
)
ROLES_OF = {
    "completions": ("text", "score", "rank", "label", "preferences", "winner"),
    "sides": ("winner", "scores"),
    "chosen": ("rejected", "score_chosen", "score_rejected"),
    "completion": ("label", "score", "votes", "steps"),
    "steps": ("label", "score", "votes"),
    "messages": ("label", "score", "votes"),
}
"""The kinds of rows by the role that tells them, the most telling first, and the roles that each has of its own."""


def kind_of(roles: Roles) -> str:
    """Return the kind of a row with these roles, a key of :data:`ROLES_OF`."""
    return next((kind for kind in ROLES_OF if kind in roles), "messages")


ITEM_ROLES = frozenset(ITEM_NAMES)
"""Roles that name keys of the items of a list of completions, or columns with a list where the items are texts."""
PAIRED_ROLES = ("sides", "winner", "scores", "votes")
"""Roles that may be played by several columns."""
COLUMN_ROLES = (*NAMES, "text", "sides", "scores", "output", "ignore")
"""Every key of ``data.columns``. ``output`` is another name of ``completion``, from HALOs' format."""


@dataclass(frozen=True, slots=True)
class Declaration:
    """What a user says about the columns and values of the files.

    Attributes:
        columns: from a role to its column (of :data:`PAIRED_ROLES` also several).
        roles: from a role of messages in the files to this project's, in addition to the common names.
        values: words that stand for judgements.
        ignore: columns that are left out knowingly.
        keep_ties: whether completions between which nobody decided are kept, without a preference.
        split_transcripts: whether a prompt ``Human: … Assistant:`` is split into turns.
        votes: how votes of several people become a label.
    """

    columns: Roles = field(default_factory=dict)
    roles: Mapping[str, str] = field(default_factory=dict)
    values: Values = field(default_factory=Values)
    ignore: tuple[str, ...] = ()
    keep_ties: bool = False
    split_transcripts: bool = True
    votes: VoteRule = field(default_factory=VoteRule)


def declared(columns: Mapping[str, object] | None) -> tuple[dict[str, Path | tuple[Path, ...]], tuple[str, ...]]:
    """Return the roles and the ignored columns of ``data.columns``.

    Raises:
        ValueError: a role does not exist, or its column is not a name.
    """
    roles: dict[str, Path | tuple[Path, ...]] = {}
    ignore: tuple[str, ...] = ()
    for role, value in (columns or {}).items():
        if value is None:
            continue
        if role not in COLUMN_ROLES:
            raise ValueError(f"data.columns.{role}: expected a role out of {', '.join(COLUMN_ROLES)}; found {role!r}")
        paths = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, Sequence) else ()
        if not all(isinstance(path, str) and path for path in paths) or (not paths and role != "ignore"):
            raise ValueError(f"data.columns.{role}: expected the name of a column, found {value!r}")
        if role == "ignore":
            ignore = tuple(sorted(set(paths)))
        elif role in PAIRED_ROLES and not isinstance(value, str):
            _check_several(role, paths)
            roles[role] = paths
        elif isinstance(value, str):
            roles["completion" if role == "output" else role] = value
        else:
            raise ValueError(f"data.columns.{role}: expected one column, found {len(paths)}")
    return roles, ignore


def _check_several(role: str, paths: tuple[Path, ...]) -> None:
    allowed = (2, 3) if role == "winner" else (2,)
    if len(paths) not in allowed:
        columns = "two columns, or three of which the last is the tie's" if role == "winner" else "two columns"
        raise ValueError(f"data.columns.{role}: expected {columns}, found {len(paths)}")


def value_at(row: RawRow, path: Path) -> object:
    """Return the value at a path, None where there is none."""
    if path in row:  # also a column whose name has dots in it
        return row[path]
    value: object = row
    for key in path.split("."):
        if isinstance(value, Mapping):
            value = value.get(key)
        elif isinstance(value, list) and key.lstrip("-").isdigit() and -len(value) <= int(key) < len(value):
            value = value[int(key)]
        else:
            return None
    return value


def column_of(row: RawRow, path: Path) -> str:
    """Return the column that a path begins with."""
    return path if path in row else path.partition(".")[0]


def has_content(value: object) -> bool:
    """Return whether a value is more than an empty text, list or object."""
    if isinstance(value, str):
        return value != "" and not value.isspace()  # strip() would copy a long text
    return value is not None and value != [] and value != {}


def check_declared(where: str, row: RawRow, roles: Roles) -> None:
    """Raise ``ValueError`` if a declared column is missing in the row."""
    for role, paths in roles.items():
        for path in (paths,) if isinstance(paths, str) else paths:
            if role not in ITEM_ROLES | {"text"} and column_of(row, path) not in row:
                raise ValueError(f"{where}: expected the key {path!r} (data.columns.{role}); found {keys_of(row)}")
