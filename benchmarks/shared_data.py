"""The data sets of ``benchmarks.shared_tokens``."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from halos.data.records.record import Completion, Prompt, Record, messages_of
from halos.data.rows.chat_tokens import ChatTokens, Limits
from halos.data.rows.chosen import ChosenRows
from halos.data.rows.token_rows import TokenRows
from halos.data.rows.tokenise import make_rows
from halos.data.sources.hh import HHSource
from halos.data.sources.oasst import tree_records
from halos.data.views.derive import VIEWS
from halos.toy.model import build_tokenizer
from halos.toy.source import ToySource

TREES = 400
TOY_PROMPTS = 1000
SCATTERED_PROMPTS = 10_000
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
VIEW = {"DPO": "pairs", "KTO": "binary", "GRPO": "scored"}
CHOSEN = {"DPO": (2, 8), "KTO": (2, 8), "GRPO": (8,)}
"""The values of ``data.keep_together`` that are counted for each loss."""


@dataclass(frozen=True, slots=True)
class Made:
    """A data set as a loss reads it."""

    name: str
    loss: str
    rows: TokenRows
    vocabulary: int

    @property
    def mismatched(self) -> bool:
        """Whether the last branch is KTO's y'."""
        return self.loss == "KTO"

    def in_order(self) -> ChosenRows:
        """All rows in the order of the reference pass."""
        return ChosenRows([(self.rows, np.arange(len(self.rows)))])


def data_sets(files: list[str]) -> Iterator[Made]:
    """Make the data sets from these files and from the toy world."""
    records = list(HHSource(files).train().records)
    tokenizer = tokenizer_of(records)
    longer = [record for record in records if len(messages_of(record.prompt)) > 1]
    for name, own, losses in (
        ("HH, several turns", longer, ("DPO", "KTO")),
        ("trees", list(trees(records)), ("DPO", "KTO")),
        ("four scored replies", list(scored(records)), ("DPO", "GRPO")),
    ):
        yield from (_made(name, loss, own, tokenizer) for loss in losses)
    toy = build_tokenizer()
    for loss, feedback in (("DPO", "pairs"), ("KTO", "labels")):
        yield _made("toy", loss, list(ToySource(size=TOY_PROMPTS, feedback=feedback).train().records), toy)
    yield _made("toy, scattered", "KTO", scattered(), toy)


def _made(name: str, loss: str, records: Sequence[Record], tokenizer: PreTrainedTokenizerFast) -> Made:
    tokens, mismatched_seed = ChatTokens(tokenizer, Limits(4096)), 0 if loss == "KTO" else None
    rows = make_rows(VIEWS[VIEW[loss]](records).examples, tokens, mismatched_seed=mismatched_seed).table
    assert isinstance(rows, TokenRows)
    return Made(name, loss, rows, len(tokenizer))


def scattered() -> list[Record]:
    """Four labelled replies to each of the toy world's prompts. Each reply is a record, and their order is random."""
    source = ToySource(size=SCATTERED_PROMPTS, completions_per_prompt=4)
    records = [
        Record(f"{record.id}-{n}", record.prompt, (completion,))
        for record in source.train().records
        for n, completion in enumerate(record.completions)
    ]
    random.Random(0).shuffle(records)
    return records


def trees(records: Sequence[Record]) -> Iterator[Record]:
    """Conversation trees with the records' texts: up to three ranked replies to a question, up to four questions."""
    rng = random.Random(0)
    question_texts = [turn.content for record in records for turn in messages_of(record.prompt) if turn.role == "user"]
    reply_texts = [completion.text for record in records for completion in record.completions]

    def question(depth: int) -> dict[str, object]:
        replies = [answer(rank, depth) for rank in range(rng.randint(1, 3))]
        return {"role": "prompter", "text": rng.choice(question_texts), "replies": replies}

    def answer(rank: int, depth: int) -> dict[str, object]:
        goes_on = depth < 4 and rng.random() < 0.5
        replies = [question(depth + 1) for _ in range(rng.randint(1, 2))] if goes_on else []
        return {"role": "assistant", "text": rng.choice(reply_texts), "rank": rank, "replies": replies}

    for number in range(TREES):
        yield from (record for _, record, _ in tree_records(f"tree {number}", {"prompt": question(1)}) if record)


def scored(records: Sequence[Record]) -> Iterator[Record]:
    """The records' prompts, each once, with four of their replies and scores from 1 to 10, all drawn at random."""
    rng = random.Random(0)
    prompts = dict[Prompt, None].fromkeys(record.prompt for record in records)
    texts = [completion.text for record in records for completion in record.completions]
    for number, prompt in enumerate(prompts):
        completions = tuple(Completion(text, score=float(rng.randint(1, 10))) for text in rng.sample(texts, 4))
        yield Record(f"scored {number}", prompt, completions)


def tokenizer_of(records: Sequence[Record]) -> PreTrainedTokenizerFast:
    """Train a tokenizer on the texts of the records."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=8000, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    texts = [turn.content for record in records for turn in messages_of(record.prompt)]
    tokenizer.train_from_iterator([*texts, *(one.text for record in records for one in record.completions)], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=SPECIAL[0], pad_token=SPECIAL[0], chat_template=CHATML
    )
