"""The toy world as a source of feedback, with its true reward."""

import itertools
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import final

from halos.checks import check_choice, check_whole
from halos.data.records.record import Completion, Prompt, Record
from halos.data.records.truth import TrueReward
from halos.data.sources.base import Records, Source
from halos.toy.feedback import MAX_DRAWN, MAX_TIES
from halos.toy.people import Annotator, is_good, people_prompts, utility
from halos.toy.world import toy_prompts
from halos.toy.writers import STAFF, WRITERS, Writer, people_reply

KINDS = ("labels", "pairs", "stars", "votes")


class ToyJudge:
    """The true reward: the reply's utility, at least 0, whatever the annotator thinks of it."""

    def reward(self, prompt: str, completion: str) -> float:
        return max(0.0, utility(prompt, completion))

    def desirable(self, prompt: str, completion: str) -> bool:
        return is_good(prompt, completion)

    def prompts(self, size: int) -> list[str]:
        # Of one turn, and the same for every run, so that runs can be compared.
        return toy_prompts(size, seed=0, split="val")


@final
@dataclass(kw_only=True, eq=False)
class ToySource(Source):
    """Feedback that one simulated person gives to replies in the toy world (:mod:`halos.toy.people`).

    Validation feedback has a fixed seed: two replies of the staff to each prompt, judged by the same person without
    noise and length bias.

    Args:
        size, val_size: the numbers of prompts.
        feedback: ``labels`` (desirable or not), ``pairs`` (preferences), ``stars`` (scores from 1 to 5) or ``votes``
            (scores: those for less those against a reply, of ``voters`` people like the annotator).
        completions_per_prompt: replies to each prompt.
        voters: how many people vote.
        writer: whose replies are judged: ``staff``, or ``beginner``, on whose replies the reference is pretrained.
        annotator: the person.
        seed: the seed of prompts, replies and answers.

    Raises:
        ValueError: naming the key of a value out of range.
    """

    name = "toy"

    size: int = 1000
    val_size: int = 128
    feedback: str = "labels"
    completions_per_prompt: int = 2
    voters: int = 5
    writer: str = "staff"
    annotator: Annotator = field(default_factory=Annotator)
    seed: int = 0

    def __post_init__(self) -> None:
        check_choice("feedback", self.feedback, KINDS)
        least = 2 if self.feedback == "pairs" else 1
        check_whole("completions_per_prompt", self.completions_per_prompt, least, MAX_DRAWN)
        check_whole("voters", self.voters, 1, MAX_DRAWN)
        check_choice("writer", self.writer, WRITERS)
        careful = replace(self.annotator, noise=0.0, length_bias=0.0)
        writer = WRITERS[self.writer]
        self._train = self._records("train", self.size, self.seed, self.annotator, writer, self.completions_per_prompt)
        self._val = self._records("val", self.val_size, 0, careful, STAFF, 2)

    def train(self) -> Records:
        return Records(self._train, Counter())

    def val(self) -> Records:
        return Records(self._val, Counter())

    def true_reward(self) -> TrueReward:
        return ToyJudge()

    def _records(self, split: str, size: int, seed: int, person: Annotator, writer: Writer, count: int) -> list[Record]:
        records = []
        for index, prompt in enumerate(people_prompts(size, seed, split)):
            where = f"toy/{split}:{index}"
            # Generators of their own for replies and answers: no setting of the person changes the replies.
            replies, answers = (random.Random(f"people/{what}/{split}/{seed}/{index}") for what in ("reply", "answer"))

            def draw(prompt: Prompt = prompt, replies: random.Random = replies) -> list[str]:
                return [people_reply(prompt, replies, writer) for _ in range(count)]

            judge = self._paired if self.feedback == "pairs" else self._single
            records.append(judge(where, prompt, draw, answers, person))
        return records

    def _single(
        self, where: str, prompt: Prompt, draw: Callable[[], list[str]], answers: random.Random, person: Annotator
    ) -> Record:
        completions = []
        for text in draw():
            if self.feedback == "labels":
                completions.append(Completion(text, desirable=person.likes(prompt, text, answers)))
            elif self.feedback == "stars":
                completions.append(Completion(text, score=float(person.stars(prompt, text, answers))))
            else:
                votes = [person.likes(prompt, text, answers) for _ in range(self.voters)]
                completions.append(Completion(text, score=float(2 * sum(votes) - self.voters)))
        return Record(where, prompt, tuple(completions))

    def _paired(
        self, where: str, prompt: Prompt, draw: Callable[[], list[str]], answers: random.Random, person: Annotator
    ) -> Record:
        # Drawn until two replies differ in value. All are drawn again: replacing one would change the others' law.
        for _ in range(MAX_TIES):
            texts = draw()
            values = [person.value(prompt, text) for text in texts]
            pairs = [(i, j) for i, j in itertools.combinations(range(len(texts)), 2) if values[i] != values[j]]
            if pairs:
                ask = [person.prefers(prompt, texts[i], texts[j], answers) for i, j in pairs]
                preferences = tuple((i, j) if first else (j, i) for (i, j), first in zip(pairs, ask, strict=True))
                return Record(where, prompt, tuple(map(Completion, texts)), preferences)
        raise RuntimeError(f"{where}: expected two replies of different value, found ties {MAX_TIES} times")
