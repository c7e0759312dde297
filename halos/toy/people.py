"""The toy world, second edition: replies that fit many prompts, more than one way to be good, and a person who judges.

The prompts are those of the first edition (:mod:`halos.toy.world`), of one or two turns, and the language has the same
words. A reply is an opening, one or two sentences of help, and a closing. It is good with a kind sentence and help:

    thanks a lot. we will check it.                                             general: it fits any prompt
    please send it. best wishes.                                                asks back: it fits any prompt
    thanks for writing. we will check the refund. please send it. best wishes.  specific, and asks back

so that the reply to another prompt can be likely, as in real feedback, and good replies have different lengths. How
good a reply is stands in :func:`utility`; what people say of it is drawn by an :class:`Annotator`. Plain Python.

Who writes the replies, and how the shares in them were chosen, stands in :mod:`halos.toy.writers`.
"""

from __future__ import annotations

import itertools
import math
import random
import re
from dataclasses import dataclass

from halos.checks import check_number, check_share
from halos.data.records.record import Message, Prompt, last_turn
from halos.toy import world

GENERAL = tuple(f"we will {verb} it." for verb in world.VERBS)
ASKS = ("please send it.", "can you send it?")
KIND, RUDE = 0.4, -0.4
HELP = {"specific": 0.5, "general": 0.4, "asks": 0.3}
"""What each kind of help adds to the utility. A reply with several kinds has the best one, and 0.1 more."""
BOTH = 0.1
WRONG = -0.3  # a noun of another topic
GOOD = 0.65  # the utility from which on a reply is desirable
MEAN_WORDS = 10  # of the staff's replies; a person with a length bias prefers longer ones
TWO_TURNS = 0.3  # the share of prompts with two turns

_SENTENCE = re.compile(r"[^.?]+[.?]")
_SPECIFIC = re.compile(f"we will (?:{'|'.join(world.VERBS)}) the (\\w+)\\.")
_TOPIC_OF = {noun: name for name, topic in world.TOPICS.items() for noun in topic.nouns}
_PLACES = {
    **dict.fromkeys(world.KIND_OPENINGS, (0, "kind")),
    **dict.fromkeys(world.RUDE_OPENINGS, (0, "rude")),
    **dict.fromkeys(GENERAL, (1, "general")),
    world.HESITATION: (1, "none"),
    **dict.fromkeys(ASKS, (2, "asks")),
    **dict.fromkeys(world.KIND_CLOSINGS, (3, "kind")),
    **dict.fromkeys(world.RUDE_CLOSINGS, (3, "rude")),
}
"""The place of each sentence in a reply, and its kind."""


def people_prompts(size: int, seed: int = 0, split: str = "train") -> list[Prompt]:
    """Return prompts of a split in seeded order, some of two turns; a larger size extends a smaller one."""
    return [_turns(text, seed, split) for text in world.toy_prompts(size, seed, split)]


def _turns(text: str, seed: int, split: str) -> Prompt:
    rng = random.Random(f"turns/{split}/{seed}/{text}")
    if rng.random() >= TWO_TURNS:
        return text
    # The customer comes back with another problem, which is the one to answer.
    topic = rng.choice([name for name in world.TOPICS if name != world.topic_of(text)])
    answer = f"{rng.choice(world.KIND_OPENINGS)} {rng.choice(GENERAL)}"
    problem = rng.choice(world.TOPICS[topic].problems)
    return Message("user", text), Message("assistant", answer), Message("user", problem)


def utility(prompt: Prompt, reply: str) -> float:
    """Return how much a reply is worth to the customer, at most 1; any string has a utility.

    It is the sum of politeness (0.4 for a kind sentence, −0.4 if any sentence is rude) and help (:data:`HELP`). A noun
    of another topic counts −0.3 in place of help, and what is no reply of this language −0.4 in all.
    """
    kinds = _kinds(last_turn(prompt), reply)
    if kinds is None:
        return RUDE
    kind = RUDE if "rude" in kinds else KIND if "kind" in kinds else 0.0
    if "wrong" in kinds:
        return kind + WRONG
    helpful = sorted((HELP[name] for name in set(kinds) if name in HELP), reverse=True)
    return kind + (helpful[0] + BOTH * (len(helpful) - 1) if helpful else 0.0)


def is_good(prompt: Prompt, reply: str) -> bool:
    """Return whether the reply is desirable: kind, with help, and not about another topic."""
    return utility(prompt, reply) >= GOOD


def _kinds(turn: str, reply: str) -> list[str] | None:
    # The kind of each sentence; None if there is another sentence, one out of order or twice.
    sentences = [sentence.strip() for sentence in _SENTENCE.findall(reply)]
    topic = world.topic_of(turn)
    places = [_place(sentence, topic) for sentence in sentences]
    known = [place for place in places if place is not None]
    ordered = all(one[0] < other[0] for one, other in itertools.pairwise(known))
    covers_reply = " ".join(sentences) == reply.strip()
    return [kind for _, kind in known] if covers_reply and known and ordered and len(known) == len(places) else None


def _place(sentence: str, topic: str | None) -> tuple[int, str] | None:
    # Where the sentence stands in a reply, and its kind.
    if match := _SPECIFIC.fullmatch(sentence):
        noun_topic = _TOPIC_OF.get(match[1])
        return None if noun_topic is None else (1, "specific" if noun_topic == topic else "wrong")
    return _PLACES.get(sentence)


@dataclass(frozen=True, slots=True, kw_only=True)
class Annotator:
    """A person who judges replies by the value function of prospect theory (Tversky and Kahneman 1992).

    The value of a reply is g^α for a gain g ≥ 0 and −λ |g|^α for a loss, where g is its utility less what the person
    expects, and the utility is raised by ``length_bias`` for each word above the mean. The defaults of α and λ are the
    medians that the paper measured.

    Args:
        expectation: the utility that the person expects, at which a reply is neither gain nor loss.
        curvature: α in (0, 1].
        loss_aversion: λ, 0 or more.
        noise: the scale of the logistic noise in each answer; 0: none.
        length_bias: utility of each word above the mean.

    Raises:
        ValueError: naming the key of a value out of range.
    """

    expectation: float = GOOD
    curvature: float = 0.88
    loss_aversion: float = 2.25
    noise: float = 0.05
    length_bias: float = 0.0

    def __post_init__(self) -> None:
        for name in ("expectation", "length_bias"):
            check_number(f"annotator.{name}", getattr(self, name), -math.inf)
        for name in ("loss_aversion", "noise"):
            check_number(f"annotator.{name}", getattr(self, name))
        check_share("annotator.curvature", self.curvature)

    def value(self, prompt: Prompt, reply: str) -> float:
        """The value of a reply to this person, without noise."""
        longer = len(re.findall(r"\w+", reply)) - MEAN_WORDS
        gain = utility(prompt, reply) + self.length_bias * longer - self.expectation
        size: float = abs(gain) ** self.curvature
        return size if gain >= 0 else -self.loss_aversion * size

    def likes(self, prompt: Prompt, reply: str, rng: random.Random) -> bool:
        """Whether the person calls the reply desirable: whether its value, with noise, is a gain."""
        return self.value(prompt, reply) + self._noise(rng) >= 0

    def prefers(self, prompt: Prompt, one: str, other: str, rng: random.Random) -> bool:
        """Whether the person prefers the first reply: whether its value is higher, with noise in the difference."""
        return self.value(prompt, one) - self.value(prompt, other) + self._noise(rng) > 0

    def stars(self, prompt: Prompt, reply: str, rng: random.Random) -> int:
        """One to five stars: three where the value, with noise, is about 0, a step for each 0.25 of value."""
        steps = round((self.value(prompt, reply) + self._noise(rng)) / 0.25)
        return min(max(3 + steps, 1), 5)

    def _noise(self, rng: random.Random) -> float:
        # Drawn even where it is not used, so that ``noise`` does not change what is drawn after it.
        share = min(max(rng.random(), 1e-12), 1 - 1e-12)
        return self.noise * math.log(share / (1 - share))
