"""Seeded feedback on the toy world's first edition: replies of a behaviour distribution, judged by the true reward."""

import itertools
import random
from collections.abc import Sequence

from halos.checks import check_choice, check_whole
from halos.data.records.record import Completion, Record
from halos.toy import world

KINDS = ("labels", "pairs")
# Shares of sound openings, bodies and closings. By their product, half of all completions are desirable.
SOUND_SHARES = (0.9, 0.86, 0.65)
MISSING_SHARE = 0.25  # of the unsound parts; the others are rude or off topic
MAX_DRAWN = 1000  # completions of a prompt, or people who vote on one: more would only take long
MAX_TIES = 200  # two completions tie about one time in three, so this many in a row never do


def _part(share: float, sound: Sequence[str], faulty: Sequence[str], rng: random.Random) -> str:
    if rng.random() < share:
        return rng.choice(sound)
    return world.HESITATION if rng.random() < MISSING_SHARE else rng.choice(faulty)


def behaviour_completion(prompt: str, rng: random.Random) -> str:
    """Draw a completion from the behaviour distribution, on which its reference policy is pretrained."""
    topic = world.topic_of(prompt)
    if topic is None:
        raise ValueError(f"prompt: expected one of the toy language, found {prompt!r}")
    verb = f"we will {rng.choice(world.VERBS)} the"
    stray = rng.choice([name for name in world.TOPICS if name != topic])
    topic_nouns, other_nouns = world.TOPICS[topic].nouns, world.CHAT + world.TOPICS[stray].nouns
    about = [[f"{verb} {noun}." for noun in nouns] for nouns in (topic_nouns, other_nouns)]
    parts = ((world.KIND_OPENINGS, world.RUDE_OPENINGS), about, (world.KIND_CLOSINGS, world.RUDE_CLOSINGS))
    return " ".join(
        _part(share, sound, faulty, rng) for share, (sound, faulty) in zip(SOUND_SHARES, parts, strict=True)
    )


def toy_feedback(
    *,
    size: int = 1000,
    feedback: str = "labels",
    noise: float = 0.0,
    keep_desirable: float = 1.0,
    keep_undesirable: float = 1.0,
    completions_per_prompt: int = 2,
    seed: int = 0,
    split: str = "train",
) -> list[Record]:
    """Generate feedback on prompts of the toy world's first edition; the same arguments give the same records.

    Args:
        size: how many prompts.
        feedback: ``labels`` (desirable or not) or ``pairs`` (preferences). A preference prefers the higher true
            reward; there is one for every two completions of a prompt that differ in it.
        noise: the probability that a label or a preference is flipped.
        keep_desirable: the share kept of the completions labelled desirable; for labels only. A prompt that keeps no
            completion is left out.
        keep_undesirable: the same for the completions labelled undesirable.
        completions_per_prompt: how many completions are drawn.
        seed: the seed of prompts and completions.
        split: ``train`` or ``val``, which share no prompts.

    Raises:
        ValueError: a value is out of range, or has no effect with this ``feedback``.
    """
    shares = {"noise": noise, "keep_desirable": keep_desirable, "keep_undesirable": keep_undesirable}
    _check_knobs(feedback, completions_per_prompt, shares)
    records = []
    for index, prompt in enumerate(world.toy_prompts(size, seed, split)):
        where = f"toy_topics/{split}:{index}"
        # A generator for each prompt, so that no argument changes the completions of other prompts.
        rng = random.Random(f"feedback/{split}/{seed}/{index}")
        if feedback == "pairs":
            records.append(_paired(where, prompt, completions_per_prompt, noise, rng))
        elif completions := _labelled(prompt, completions_per_prompt, noise, (keep_undesirable, keep_desirable), rng):
            records.append(Record(where, prompt, completions))
    return records


def _labelled(
    prompt: str, count: int, noise: float, keep: tuple[float, float], rng: random.Random
) -> tuple[Completion, ...]:
    """Labelled completions; ``keep`` is (share of the undesirable, share of the desirable)."""
    completions = []
    for _ in range(count):
        text = behaviour_completion(prompt, rng)
        # Both numbers are always drawn, so that ``noise`` and ``keep`` do not change the texts that follow.
        flipped, threshold = rng.random() < noise, rng.random()
        desirable = world.is_desirable(prompt, text) != flipped
        if threshold < keep[desirable]:
            completions.append(Completion(text, desirable=desirable))
    return tuple(completions)


def _paired(where: str, prompt: str, count: int, noise: float, rng: random.Random) -> Record:
    """Draw completions until at least two differ in their true reward."""
    for _ in range(MAX_TIES):
        # All are drawn again after a tie: replacing one of them would change the distribution of the others.
        texts = [behaviour_completion(prompt, rng) for _ in range(count)]
        rewards = [world.true_reward(prompt, text) for text in texts]
        ordered = [(i, j) for i, j in itertools.permutations(range(count), 2) if rewards[i] > rewards[j]]
        if ordered:
            preferences = tuple((j, i) if rng.random() < noise else (i, j) for i, j in ordered)
            return Record(where, prompt, tuple(map(Completion, texts)), preferences)
    raise RuntimeError(f"{where}: expected two completions of different reward, found ties {MAX_TIES} times")


def _check_knobs(feedback: str, completions_per_prompt: int, shares: dict[str, float]) -> None:
    check_choice("feedback", feedback, KINDS)
    for name, share in shares.items():
        # NaN fails this comparison too.
        if not 0.0 <= share <= 1.0:
            raise ValueError(f"{name}: expected a share from 0 to 1, found {share}")
        if feedback == "pairs" and name != "noise" and share != 1.0:
            raise ValueError(f"{name}: expected 1 with feedback='pairs', which has no labels; found {share}")
    check_whole("completions_per_prompt", completions_per_prompt, 2 if feedback == "pairs" else 1, MAX_DRAWN)
