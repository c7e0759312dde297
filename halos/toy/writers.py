"""Who writes the replies of the toy world's second edition (:mod:`halos.toy.people`).

There are two writers of replies. The reference policy is pretrained on those of a :data:`BEGINNER`, and people judge
those of the :data:`STAFF`, as feedback on chat models is mostly about other models' replies. On its own replies KTO's
reference point could not rise above 0: the mean of log π_θ − log π_ref over samples of π_ref is −KL(π_ref ‖ π_θ).
The shares below, and how long the reference is pretrained, were chosen in 23 short runs (14 of KTO, 7 of KTO with
z₀ = 0, 2 of SFT) by two things: in how many steps KTO's reference point is above 0, and the share of good replies. No
other loss had been run when they were fixed.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from halos.data.records.record import Prompt, last_turn
from halos.toy import world
from halos.toy.people import ASKS, GENERAL


@dataclass(frozen=True, slots=True, kw_only=True)
class Writer:
    """The habits of somebody who writes replies: what stands in them, and how often.

    Args:
        help: the weight of each kind of help; ``wrong`` is specific help about another topic.
        kind_opening, rude_opening, kind_closing, rude_closing: shares of the replies.
    """

    help: dict[str, float]
    kind_opening: float
    rude_opening: float
    kind_closing: float
    rude_closing: float


BEGINNER = Writer(
    help={
        "general": 26,
        "asks": 12,
        "general asks": 5,
        "specific": 20,
        "specific asks": 4,
        "wrong": 3,
        "none": 30,
    },
    kind_opening=0.15,
    rude_opening=0.2,
    kind_closing=0.45,
    rude_closing=0.12,
)
"""Helps half-heartedly, and is kind, if at all, at the end; two replies in seven are good."""
STAFF = Writer(
    help={
        "general": 24,
        "asks": 8,
        "general asks": 38,
        "specific": 8,
        "specific asks": 11,
        "wrong": 2,
        "none": 9,
    },
    kind_opening=0.92,
    rude_opening=0.02,
    kind_closing=0.5,
    rude_closing=0.02,
)
"""Thanks first, helps, and mostly asks back; four replies in five are good."""
WRITERS = {"beginner": BEGINNER, "staff": STAFF}


def people_reply(prompt: Prompt, rng: random.Random, writer: Writer = STAFF) -> str:
    """Draw a reply of a writer."""
    topic = world.topic_of(last_turn(prompt))
    if topic is None:
        raise ValueError(f"prompt: expected one of the toy language, found {prompt!r}")
    other = rng.choice([name for name in world.TOPICS if name != topic])
    sentences = {
        "general": rng.choice(GENERAL),
        "asks": rng.choice(ASKS),
        "specific": _specific(topic, rng),
        "wrong": _specific(other, rng),
        "none": world.HESITATION,
    }
    kinds = rng.choices(list(writer.help), weights=list(writer.help.values()))[0].split()
    opening = _maybe(rng, (writer.kind_opening, world.KIND_OPENINGS), (writer.rude_opening, world.RUDE_OPENINGS))
    closing = _maybe(rng, (writer.kind_closing, world.KIND_CLOSINGS), (writer.rude_closing, world.RUDE_CLOSINGS))
    return " ".join([*opening, *(sentences[kind] for kind in kinds), *closing])


def _specific(topic: str, rng: random.Random) -> str:
    return f"we will {rng.choice(world.VERBS)} the {rng.choice(world.TOPICS[topic].nouns)}."


def _maybe(rng: random.Random, *options: tuple[float, tuple[str, ...]]) -> list[str]:
    number = rng.random()
    for share, phrases in options:
        if number < share:
            return [rng.choice(phrases)]
        number -= share
    return []
