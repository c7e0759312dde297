"""The toy world: a small customer-service language whose true reward is known.

A prompt is a purchase and a problem ("i bought a lamp on monday. where is my parcel?"); a good completion is a kind
opening, a remedy that fits the problem's topic, and a kind closing. Plain Python.
"""

from __future__ import annotations

import itertools
import random
import re
from dataclasses import dataclass
from functools import cache


@dataclass(frozen=True, slots=True)
class Topic:
    """What customers say about a topic, and the remedies that answer it."""

    problems: tuple[str, ...]
    remedies: tuple[str, ...]


TOPICS: dict[str, Topic] = {
    "refund": Topic(
        ("i want my money back.", "how do i get a refund?", "please refund me.", "my refund never came."),
        ("refund your money", "return the price", "repay the sum"),
    ),
    "delivery": Topic(
        ("where is my parcel?", "the parcel is late.", "when will it arrive?", "it was never delivered."),
        ("track your parcel", "hurry the courier", "trace the van"),
    ),
    "password": Topic(
        ("i forgot my password.", "the password is wrong.", "i cannot log in.", "the login page fails."),
        ("reset your password", "unlock the login", "renew your access"),
    ),
    "invoice": Topic(
        ("i need an invoice.", "where is my receipt?", "the invoice is wrong.", "please send the receipt."),
        ("print the invoice", "email the receipt", "correct the bill"),
    ),
    "repair": Topic(
        ("it stopped working.", "it is broken.", "can you repair it?", "it makes a strange noise."),
        ("repair the fault", "book a technician", "replace the part"),
    ),
    "exchange": Topic(
        ("it is the wrong size.", "i need another colour.", "can i exchange it?", "it does not fit."),
        ("exchange the item", "swap the size", "ship another colour"),
    ),
    "cancellation": Topic(
        ("please cancel the order.", "i changed my mind.", "can i still cancel?", "we no longer need it."),
        ("cancel the order", "stop the shipment", "void the purchase"),
    ),
    "payment": Topic(
        ("my card was declined.", "i paid twice.", "the payment failed.", "you charged me twice."),
        ("check the payment", "reverse the charge", "retry the card"),
    ),
    "warranty": Topic(
        ("is it under warranty?", "how long is the warranty?", "my warranty has ended.", "does the guarantee apply?"),
        ("extend the warranty", "honour the guarantee", "confirm your cover"),
    ),
    "discount": Topic(
        ("the coupon does not work.", "can i get a discount?", "is there a student price?", "my voucher has expired."),
        ("apply the discount", "issue a voucher", "accept the coupon"),
    ),
    "address": Topic(
        ("i moved house.", "the address is wrong.", "i have a new address.", "please change the street name."),
        ("update your address", "change the postcode", "edit the street"),
    ),
    "manual": Topic(
        ("how do i set it up?", "i lost the manual.", "i need instructions.", "how does it switch on?"),
        ("share the manual", "explain the setup", "send clear instructions"),
    ),
}

BUYERS = ("i bought a", "we bought a", "i ordered a", "we ordered a")
ITEMS = ("lamp", "phone", "chair", "jacket", "kettle", "camera", "watch", "tent", "radio", "desk")
TIMES = ("on monday", "on tuesday", "on friday", "last week", "last month", "yesterday", "in may")

AGENTS = ("we", "i")
WHENS = ("today", "tomorrow", "now")
KIND_OPENINGS = ("thanks for asking.", "happy to help.", "sorry about that.", "glad you wrote.")
RUDE_OPENINGS = ("not you again.", "what now?", "quit whining.", "nobody cares.")
KIND_CLOSINGS = ("have a nice day.", "take good care.", "all the best.", "with kind regards.")
RUDE_CLOSINGS = ("go away.", "leave us alone.", "never come back.", "get lost.")

SPLITS = ("train", "val")
VAL_EVERY = 5  # one prompt in five is held out


def _one_of(phrases: tuple[str, ...]) -> str:
    return "(?:" + "|".join(map(re.escape, phrases)) + ")"


_REMEDIES = tuple(remedy for topic in TOPICS.values() for remedy in topic.remedies)
_COMPLETE = re.compile(
    f"{_one_of(KIND_OPENINGS + RUDE_OPENINGS)} "
    f"{_one_of(AGENTS)} will {_one_of(_REMEDIES)} {_one_of(WHENS)}\\. "
    f"{_one_of(KIND_CLOSINGS + RUDE_CLOSINGS)}"
)


@cache
def prompts_of(split: str) -> tuple[str, ...]:
    """Every prompt of a split, in a fixed order; "train" and "val" share none, yet both show every word."""
    if split not in SPLITS:
        raise ValueError(f"split: expected one of {', '.join(SPLITS)}; found {split!r}")
    problems = [problem for topic in TOPICS.values() for problem in topic.problems]
    slots = (BUYERS, ITEMS, TIMES, problems)
    found = []
    for choice in itertools.product(*(range(len(slot)) for slot in slots)):
        # A diagonal through the slots: every value of each slot is met in both splits, no combination is.
        if (sum(choice) % VAL_EVERY == 0) == (split == "val"):
            buyer, item, time, problem = (slot[i] for slot, i in zip(slots, choice, strict=True))
            found.append(f"{buyer} {item} {time}. {problem}")
    return tuple(found)


def toy_prompts(size: int, seed: int = 0, split: str = "val") -> list[str]:
    """``size`` distinct prompts of a split, in seeded order; a larger size extends a smaller one."""
    prompts = list(prompts_of(split))
    if not 1 <= size <= len(prompts):
        raise ValueError(f"size: expected 1 to {len(prompts)} prompts of split {split!r}, found {size}")
    random.Random(f"prompts/{split}/{seed}").shuffle(prompts)
    return prompts[:size]


def topic_of(prompt: str) -> str | None:
    """The topic of the problem that the prompt states, or None."""
    return next((name for name, topic in TOPICS.items() if any(p in prompt for p in topic.problems)), None)


def is_polite(completion: str) -> bool:
    """A kind opening or closing is there, and nothing rude."""
    rude = any(phrase in completion for phrase in RUDE_OPENINGS + RUDE_CLOSINGS)
    return not rude and any(phrase in completion for phrase in KIND_OPENINGS + KIND_CLOSINGS)


def is_on_topic(prompt: str, completion: str) -> bool:
    """A remedy for the prompt's topic is there, and no other topic's."""
    named = {name for name, topic in TOPICS.items() if any(r in completion for r in topic.remedies)}
    return named == {topic_of(prompt)}


def is_complete(completion: str) -> bool:
    """Exactly an opening, a body and a closing, each a finished sentence."""
    return _COMPLETE.fullmatch(completion.strip()) is not None


def true_reward(prompt: str, completion: str) -> float:
    """Mean of three checks, in [0, 1]: polite, on topic, complete. Any string has a reward."""
    return (is_polite(completion) + is_on_topic(prompt, completion) + is_complete(completion)) / 3


def is_desirable(prompt: str, completion: str) -> bool:
    """All three checks of :func:`true_reward` hold."""
    return is_polite(completion) and is_on_topic(prompt, completion) and is_complete(completion)


def words() -> list[str]:
    """Every word and punctuation mark of the language, sorted."""
    parts = (BUYERS, ITEMS, TIMES, AGENTS, WHENS, KIND_OPENINGS, RUDE_OPENINGS, KIND_CLOSINGS, RUDE_CLOSINGS)
    phrases = itertools.chain(*parts, *(topic.problems + topic.remedies for topic in TOPICS.values()))
    return sorted({"will"}.union(*(re.findall(r"\w+|[^\w\s]", phrase) for phrase in phrases)))
