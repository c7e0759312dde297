"""Files in this project's format, TRL's, HALOs' or UltraFeedback's; the keys of each row tell which."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import final

from halos.data.reading import fields
from halos.data.reading.context import in_context
from halos.data.reading.fields import RawRow, required, wrong
from halos.data.records.record import Completion, Prompt, Record, Reply, messages_of, prompt_key, reply_text
from halos.data.sources.adapted import DIFFERENT_PROMPTS, FILTERED, without_empty
from halos.data.sources.base import RowSource

Adapter = Callable[[str, RawRow, Counter[str]], Record | None]
"""Makes a record of a row of one format; see :meth:`.RowSource.record`."""
UNTRAINED = f"{FILTERED}conversation without a reply of weight 1"
AFTER_TRAINED = f"{FILTERED}turn after the last reply of weight 1"
COMPLETION_KEYS = {"text", "messages", "desirable", "score"}


def to_record(where: str, row: RawRow, dropped: Counter[str]) -> Record | None:
    """Adapt a row of any of the formats."""
    record = _adapter(where, row)(where, row, dropped)
    if record is None:
        return None
    prompt = in_context(where, row, record.prompt)
    return record if prompt is record.prompt else replace(record, prompt=prompt)


def _adapter(where: str, row: RawRow) -> Adapter:
    for name, adapter in BY_TYPE.items():
        if row.get("type") == name:
            return adapter
    # A table of rows in several formats has empty texts in the columns of the others: a key with content counts first.
    for is_present in (_has_content, fields.has):
        for adapter, keys in BY_KEYS:
            if any(is_present(row, key) for key in keys):
                return adapter
    raise ValueError(
        f"{where}: expected 'prompt' with 'completions', 'chosen' and 'rejected', 'completion', 'output', or "
        f"'output_A' and 'output_B', or else 'messages'; found {fields.keys_of(row)}"
    )


def _has_content(row: RawRow, key: str) -> bool:
    value = row.get(key)
    return bool(value.strip()) if isinstance(value, str) else value is not None


def own_record(where: str, row: RawRow, dropped: Counter[str]) -> Record | None:
    """Adapt this project's format: a prompt, its completions with labels or scores, and preferences between them."""
    items = required(where, row, "completions")
    if not isinstance(items, list) or not items:
        raise wrong(where, "completions", "a list of objects with 'text'", items)
    record = Record(
        id=where,
        prompt=fields.prompt_of(where, row),
        completions=tuple(_completion(where, f"completions[{i}]", item) for i, item in enumerate(items)),
        preferences=_preferences(where, row.get("preferences")),
    )
    name = row.get("id")
    if name is not None:
        record_id = fields.text_of(where, "id", name)
        if not record_id.strip():
            raise wrong(where, "id", "a name", name)
        # Only now: the errors of the record's own checks have named the file and the line, which help more than its id.
        record = replace(record, id=record_id)
    return without_empty(record, dropped)


def _completion(where: str, name: str, item: object) -> Completion:
    if not isinstance(item, dict) or fields.has(item, "text") == fields.has(item, "messages"):
        raise wrong(where, name, "an object with 'text' or 'messages'", item)
    # A mistyped 'desirable' would otherwise pass for a completion without feedback.
    if unknown := sorted(item.keys() - COMPLETION_KEYS):
        raise ValueError(
            f"{where}: expected {name!r} to have 'text' (or 'messages'), 'desirable' and 'score' only; "
            f"found {fields.shorten(unknown[0])}"
        )
    label = item.get("desirable")
    reply: Reply
    if fields.has(item, "text"):
        reply = fields.text_of(where, f"{name}.text", item["text"])
    else:
        reply = fields.messages_of(where, f"{name}.messages", item["messages"])
        if not reply[-1].weight:
            raise wrong(where, f"{name}.messages[{len(reply) - 1}].weight", "1, as the last turn is judged", 0)
    return Completion.of(
        reply,
        desirable=None if label is None else fields.label_of(where, f"{name}.desirable", label),
        score=fields.score_of(where, f"{name}.score", item.get("score")),
    )


def _preferences(where: str, value: object) -> tuple[tuple[int, int], ...]:
    if value is None:
        return ()
    if not isinstance(value, list):
        raise wrong(where, "preferences", "a list of [better, worse]", value)
    for i, pair in enumerate(value):
        # By type: true and false are the indices 1 and 0 to Python.
        if not isinstance(pair, list) or [type(index) for index in pair] != [int, int]:
            raise wrong(where, f"preferences[{i}]", "two indices [better, worse]", pair)
    return tuple((better, worse) for better, worse in value)


def preference_record(where: str, row: RawRow, dropped: Counter[str]) -> Record | None:
    """Adapt TRL's preference format and UltraFeedback's.

    ``chosen`` and ``rejected`` are a text, one message or the whole conversation, whose turns before the last are then
    the prompt.
    """
    own_prompt = fields.prompt_of(where, row) if fields.has(row, "prompt") else None
    (before, chosen), (before_rejected, rejected) = (fields.reply_of(where, row, key) for key in ("chosen", "rejected"))
    prompt, other = before or own_prompt, before_rejected or own_prompt
    if prompt is None or other is None:
        is_hh = reply_text(chosen).lstrip().startswith("Human:")
        hint = "; for transcripts 'Human: ... Assistant: ...' use data=hh" if is_hh else ""
        raise ValueError(f"{where}: expected 'prompt' next to 'chosen' and 'rejected'; found none{hint}")
    # A pair whose sides differ before the last turn compares conversations, not replies to one prompt.
    if prompt_key(prompt) != prompt_key(other):
        dropped[DIFFERENT_PROMPTS] += 1
        return None
    _check_agreement(where, "chosen", own_prompt, prompt)
    completions = (_scored(where, row, chosen, "score_chosen"), _scored(where, row, rejected, "score_rejected"))
    return without_empty(Record(where, prompt, completions, ((0, 1),)), dropped)


def _scored(where: str, row: RawRow, reply: Reply, key: str) -> Completion:
    return Completion.of(reply, score=fields.score_of(where, key, row.get(key)))


def _check_agreement(where: str, key: str, prompt: Prompt | None, turns: Prompt) -> None:
    """Raise ``ValueError`` unless the turns before a completion repeat the prompt of the row.

    A prompt that is a text may repeat the first user turn only, as UltraFeedback's does.
    """
    if prompt is None or prompt_key(prompt) == prompt_key(turns):
        return
    question = next((message.content for message in messages_of(turns) if message.role == "user"), None)
    if isinstance(prompt, str) and question is not None and question.strip() == prompt.strip():
        return
    raise ValueError(
        f"{where}: expected {key!r} to be one assistant message, or the conversation that 'prompt' starts; "
        "found other turns before the completion"
    )


def completion_record(where: str, row: RawRow, dropped: Counter[str]) -> Record | None:
    """Adapt TRL's unpaired format: ``completion`` with ``label``, ``score``, both, or neither (a demonstration)."""
    return _single(where, row, "completion", "score", dropped)


def binary_record(where: str, row: RawRow, dropped: Counter[str]) -> Record | None:
    """Adapt HALOs' ``binary_feedback`` and ``scalar_feedback``: ``output`` with ``label``, ``reward`` or both."""
    if row.get("type") == "binary_feedback" or not fields.has(row, "reward"):
        required(where, row, "label")
    return _single(where, row, "output", "reward", dropped)


def _single(where: str, row: RawRow, key: str, score: str, dropped: Counter[str]) -> Record | None:
    own_prompt = fields.prompt_of(where, row)
    before, reply = fields.reply_of(where, row, key)
    prompt = before or own_prompt
    _check_agreement(where, key, own_prompt, prompt)
    return without_empty(Record(where, prompt, (_judged(where, row, reply, score),)), dropped)


def _judged(where: str, row: RawRow, reply: Reply, score: str) -> Completion:
    # A label that is present but null is an error, not a completion without feedback.
    label = fields.label_of(where, "label", row["label"]) if "label" in row else None
    return Completion.of(reply, label, fields.score_of(where, score, row.get(score)))


def pairwise_record(where: str, row: RawRow, dropped: Counter[str]) -> Record | None:
    """Adapt HALOs' ``pairwise_feedback``: ``label`` 1 means that ``output_A`` is preferred, 0 that ``output_B`` is."""
    prompt = fields.prompt_of(where, row)
    preferences = fields.preference_of(where, row, "label", "output_A", "output_B")
    (before_a, a), (before_b, b) = (fields.reply_of(where, row, key) for key in ("output_A", "output_B"))
    for key, before in (("output_A", before_a), ("output_B", before_b)):
        _check_agreement(where, key, prompt, before or prompt)
    completions = (_scored(where, row, a, "reward_A"), _scored(where, row, b, "reward_B"))
    return without_empty(Record(where, prompt, completions, preferences), dropped)


def conversation_record(where: str, row: RawRow, dropped: Counter[str]) -> Record | None:
    """Adapt a conversation whose last turn is the completion, with or without ``label`` and ``score``."""
    turns = trained_turns(required(where, row, "messages"), dropped)
    if turns is None:
        return None
    prompt, reply = fields.reply_of(where, {"messages": turns}, "messages")
    if not prompt:
        raise wrong(where, "messages", "a prompt and an assistant's turn after it", row["messages"])
    return without_empty(Record(where, prompt, (_judged(where, row, reply, "score"),)), dropped)


def trained_turns(messages: object, dropped: Counter[str]) -> object:
    """Return messages up to the last reply whose weight is not 0, None if they end without such a reply."""
    if not isinstance(messages, list) or not all(isinstance(turn, dict) for turn in messages):
        return messages  # the reader of messages says what is wrong
    if not messages or messages[-1].get("weight") != 0:
        return messages
    ends = [n for n, turn in enumerate(messages, 1) if turn.get("role") == "assistant" and turn.get("weight") != 0]
    if not ends:
        dropped[UNTRAINED] += 1
        return None
    dropped[AFTER_TRAINED] += len(messages) - ends[-1]
    return messages[: ends[-1]]


# HALOs' rows name their format. A name counts before any key.
BY_TYPE: dict[str, Adapter] = {"binary_feedback": binary_record, "pairwise_feedback": pairwise_record}
# In order: the more a format demands, the earlier. UltraFeedback's rows have "messages" next to "chosen", for one.
BY_KEYS: tuple[tuple[Adapter, tuple[str, ...]], ...] = (
    (own_record, ("completions",)),
    (pairwise_record, ("output_A", "output_B")),
    (preference_record, ("chosen", "rejected")),
    (completion_record, ("completion",)),
    (binary_record, ("output",)),
    (conversation_record, ("messages",)),
)


@final
class JsonSource(RowSource):
    """Files in this project's format, TRL's, HALOs' or UltraFeedback's, recognised row by row."""

    name = "json"

    def record(self, where: str, row: RawRow, dropped: Counter[str]) -> Record | None:
        return to_record(where, row, dropped)
