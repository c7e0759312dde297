"""The toy world: a small customer-service language whose true reward is known.

A prompt is a purchase and a problem ("i bought a lamp on monday. where is my parcel?"); a good completion is a kind
opening, a body about the problem's topic, and a kind closing ("thanks a lot. we will check the parcel. best wishes.").
A faulty completion has a wrong word ("now" instead of "best") and the same length, so that a small policy can correct
it under any objective before it forgets the grammar. Plain Python, no torch.
"""

import itertools
import random
import re
from dataclasses import dataclass
from functools import cache

from halos.checks import check_choice, check_whole


@dataclass(frozen=True, slots=True)
class Topic:
    """Customers' sentences about a topic, and the nouns that a good answer uses."""

    problems: tuple[str, ...]
    nouns: tuple[str, ...]


# A line for each topic: its nouns, the first of which names it, and its problems.
_TOPICS = """
refund, repayment: i want my money back.; how do i get a refund?; please refund me.; my refund never came.
delivery, parcel: where is my parcel?; the parcel is late.; when will it arrive?; it was never delivered.
password, login: i forgot my password.; the password is wrong.; i cannot log in.; the login page fails.
invoice, receipt: i need an invoice.; where is my receipt?; the invoice is wrong.; please send the receipt.
repair, fault: it stopped working.; it is broken.; can you repair it?; it makes a strange noise.
exchange, swap: it is the wrong size.; i need another colour.; can i exchange it?; it does not fit.
cancellation, withdrawal: please cancel the order.; i changed my mind.; can i still cancel?; we no longer need it.
payment, charge: my card was declined.; i paid twice.; the payment failed.; you charged me twice.
warranty, guarantee: is it under warranty?; how long is the warranty?; my warranty has ended.; does the guarantee apply?
discount, coupon: the coupon does not work.; can i get a discount?; is there a student price?; my voucher has expired.
address, postcode: i moved house.; the address is wrong.; i have a new address.; please change the street name.
manual, guide: how do i set it up?; i lost the manual.; i need instructions.; how does it switch on?
"""


def _read_topics(table: str) -> dict[str, Topic]:
    topics = {}
    for line in table.strip().splitlines():
        nouns, _, problems = line.partition(": ")
        name, *others = nouns.split(", ")
        topics[name] = Topic(tuple(problems.split("; ")), (name, *others))
    return topics


TOPICS = _read_topics(_TOPICS)

BUYERS = ("i bought a", "we bought a", "i ordered a", "we ordered a")
ITEMS = ("lamp", "phone", "chair", "jacket", "kettle", "camera", "watch", "tent", "radio", "desk")
TIMES = ("on monday", "on tuesday", "on friday", "last week", "last month", "yesterday", "in may")

VERBS = ("check", "settle")
CHAT = ("weather", "football")  # off topic everywhere
KIND_OPENINGS = ("thanks for asking.", "thanks for writing.", "thanks a lot.")
RUDE_OPENINGS = ("stop asking.", "stop whining.")
KIND_CLOSINGS = ("best wishes.", "best regards.", "best of luck.")
RUDE_CLOSINGS = ("now leave.", "now go away.")
HESITATION = "hm."  # takes the place of a missing part

SPLITS = ("train", "val")
VAL_EVERY = 5  # one prompt in five is held out


def _one_of(phrases: tuple[str, ...]) -> str:
    return "(?:" + "|".join(map(re.escape, phrases)) + ")"


_NOUNS = tuple(noun for topic in TOPICS.values() for noun in topic.nouns) + CHAT
_COMPLETE = re.compile(
    f"{_one_of(KIND_OPENINGS + RUDE_OPENINGS)} we will {_one_of(VERBS)} the {_one_of(_NOUNS)}\\. "
    f"{_one_of(KIND_CLOSINGS + RUDE_CLOSINGS)}"
)


@cache
def prompts_of(split: str) -> tuple[str, ...]:
    """Return all prompts of a split in a fixed order. The splits share no prompt, but both use every word."""
    check_choice("split", split, SPLITS)
    problems = [problem for topic in TOPICS.values() for problem in topic.problems]
    slots = (BUYERS, ITEMS, TIMES, problems)
    prompts = []
    for choice in itertools.product(*(range(len(slot)) for slot in slots)):
        # A diagonal through the slots: each phrase occurs in both splits, each combination in one.
        if (sum(choice) % VAL_EVERY == 0) == (split == "val"):
            buyer, item, time, problem = (slot[i] for slot, i in zip(slots, choice, strict=True))
            prompts.append(f"{buyer} {item} {time}. {problem}")
    return tuple(prompts)


def toy_prompts(size: int, seed: int = 0, split: str = "val") -> list[str]:
    """Return ``size`` distinct prompts of a split in seeded order; a larger size extends a smaller one."""
    # All prompts are shuffled before the cut, so that a larger sample starts with the smaller one.
    prompts = list(prompts_of(split))
    check_whole("size", size, 1)
    if size > len(prompts):
        raise ValueError(f"size: expected 1 to {len(prompts)} prompts of split {split!r}, found {size}")
    random.Random(f"prompts/{split}/{seed}").shuffle(prompts)
    return prompts[:size]


def topic_of(prompt: str) -> str | None:
    """Return the topic of the problem in the prompt, or None."""
    return next((name for name, topic in TOPICS.items() if any(p in prompt for p in topic.problems)), None)


def is_polite(completion: str) -> bool:
    """Return whether the completion has a kind opening or closing, and nothing rude."""
    # One rude phrase outweighs a kind one, so that a policy gains nothing by writing both.
    rude = any(phrase in completion for phrase in RUDE_OPENINGS + RUDE_CLOSINGS)
    return not rude and any(phrase in completion for phrase in KIND_OPENINGS + KIND_CLOSINGS)


def is_on_topic(prompt: str, completion: str) -> bool:
    """Return whether the completion has a noun of the prompt's topic, and none of another topic."""
    # Whole words: "fault" must not count in "default".
    used = set(re.findall(r"\w+", completion))
    return {name for name, topic in TOPICS.items() if used.intersection(topic.nouns)} == {topic_of(prompt)}


def is_complete(completion: str) -> bool:
    """Return whether the completion is an opening, a body and a closing, each a finished sentence, and nothing else."""
    return _COMPLETE.fullmatch(completion.strip()) is not None


def true_reward(prompt: str, completion: str) -> float:
    """Return the mean of three checks (polite, on topic, complete), in [0, 1]; any string has a reward."""
    return (is_polite(completion) + is_on_topic(prompt, completion) + is_complete(completion)) / 3


def is_desirable(prompt: str, completion: str) -> bool:
    """Return whether all three checks of :func:`true_reward` hold."""
    return is_polite(completion) and is_on_topic(prompt, completion) and is_complete(completion)


def words() -> list[str]:
    """Return every word and punctuation mark of the language, sorted."""
    # Sorted, as token ids follow this order, and a set's order changes from process to process.
    slots = (BUYERS, ITEMS, TIMES, VERBS, CHAT)
    parts = (KIND_OPENINGS, RUDE_OPENINGS, KIND_CLOSINGS, RUDE_CLOSINGS, (HESITATION,))
    topics = (topic.problems + topic.nouns for topic in TOPICS.values())
    phrases = itertools.chain(*slots, *parts, *topics)
    return sorted({"we", "will", "the"}.union(*(re.findall(r"\w+|[^\w\s]", phrase) for phrase in phrases)))
