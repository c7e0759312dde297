"""UltraFeedback: raw, with four scored completions of an instruction, and binarized, with the best and another one."""

from __future__ import annotations

from collections import Counter

from halos.data.feedback import Completion, Feedback
from halos.data.fields import Row, has, keys_of, prompt_of, required, score_of, text_of, wrong
from halos.data.formats import preference_record, without_empty

SCORES = ("overall_score", "fine-grained_score")
NO_COMPLETIONS = "instruction without completions"


def ultrafeedback_record(where: str, row: Row, dropped: Counter[str], *, score: str) -> Feedback | None:
    """A raw row's completions with the score named ``score``; a binarized row as a pair with its two scores."""
    if not has(row, "instruction"):
        return preference_record(where, row, dropped)
    items = required(where, row, "completions")
    if not isinstance(items, list):
        raise wrong(where, "completions", "a list of objects with 'response'", items)
    if not items:
        dropped[NO_COMPLETIONS] += 1
        return None
    completions = tuple(_completion(where, f"completions[{n}]", item, score) for n, item in enumerate(items))
    return without_empty(Feedback(where, prompt_of(where, row, "instruction"), completions), dropped)


def _completion(where: str, name: str, item: object, score: str) -> Completion:
    if not isinstance(item, dict) or not has(item, "response"):
        raise wrong(where, name, "an object with 'response'", item)
    if score not in item:
        raise ValueError(f"{where}: expected {name!r} to have {score!r} (data.source.score); found {keys_of(item)}")
    return Completion(
        text_of(where, f"{name}.response", item["response"]),
        score=score_of(where, f"{name}.{score}", item[score]),
    )
