"""Count the tokens that a pass over conversations computes, by how much of them rows share.

    python benchmarks/shared_tokens.py FILE [FILE …]

The files are pairs in the format of Anthropic's HH-RLHF. The same texts are also arranged as conversation trees like
OpenAssistant's, in which up to three replies answer each turn and any of them may be continued. Texts are tokenised by
a byte-level BPE of 8,000 tokens that is trained on them, in ChatML. For each data set, loss and ``data.keep_together``,
the columns are the tokens of a pass in micro-batches of 8 examples:

- separate: a row for each completion, with its prompt;
- prompt: a prompt is computed once for all its completions in the micro-batch;
- tree: what sequences begin with is computed once, and examples of one conversation are drawn together.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator, Sequence

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from halos.data.batches.order import Division, Numbers, TrainingOrder
from halos.data.batches.packing import pack
from halos.data.records.record import Record, messages_of
from halos.data.rows.chat_tokens import ChatTokens, Limits
from halos.data.rows.token_rows import Row
from halos.data.rows.tokenise import make_rows
from halos.data.sources.hh import HHSource
from halos.data.sources.oasst import tree_records
from halos.data.views.derive import VIEWS

BATCH_SIZE = 8
TREES = 400
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def main(files: list[str]) -> None:
    """Print the table for these files."""
    records = list(HHSource(files).train().records)
    tokens = ChatTokens(tokenizer_of(records), Limits(4096))
    longer = [record for record in records if len(messages_of(record.prompt)) > 1]
    print("| data | loss | keep_together | separate | prompt | tree | tree / prompt |\n|---|---|---|---|---|---|---|")
    for name, own in (("HH, several turns", longer), ("trees", list(trees(records)))):
        for loss, view in (("DPO", "pairs"), ("KTO", "binary")):
            mismatched = loss == "KTO"
            made = make_rows(VIEWS[view](own).examples, tokens, mismatched_seed=0 if mismatched else None).table
            rows = list(made)
            for together in (2, 8):
                before = list(batches(rows, made.groups, together))
                separate, shared = sum(map(separate_tokens, before)), sum(map(prompt_tokens, before))
                tree = sum(tree_tokens(batch, mismatched) for batch in batches(rows, made.conversations, together))
                cells = (name, loss, together, f"{separate:,}", f"{shared:,}", f"{tree:,}", f"{tree / shared:.2f}")
                print(f"| {' | '.join(map(str, cells))} |", flush=True)


def batches(rows: Sequence[Row], groups: Numbers, together: int) -> Iterator[list[Row]]:
    """The micro-batches of a pass in which up to ``together`` examples of a group are drawn together."""
    division = Division(batch_size=BATCH_SIZE, steps=len(rows) // BATCH_SIZE)
    for micro in TrainingOrder(len(rows), division, groups=groups, together=together):
        yield [rows[index] for index in micro.rows]


def separate_tokens(batch: Sequence[Row]) -> int:
    """Tokens of a row for each completion."""
    return sum(len(row.prompt) + len(branch) - 1 for row in batch for branch in row.branches)


def prompt_tokens(batch: Sequence[Row]) -> int:
    """Tokens where a prompt is computed once for all its completions."""
    branches = {(row.prompt, branch) for row in batch for branch in row.branches}
    return sum(map(len, {row.prompt for row in batch})) + sum(len(branch) - 1 for _, branch in branches)


def tree_tokens(batch: Sequence[Row], mismatched: bool) -> int:
    """Tokens where what sequences begin with is computed once."""
    width = max(len(branch) for row in batch for branch in row.branches)
    return sum(len(part.input_ids) for part in pack(batch, width=width, mismatched=mismatched))


def trees(records: Sequence[Record]) -> Iterator[Record]:
    """Conversation trees of the records' texts: up to three ranked replies to a turn, up to four turns deep."""
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


def tokenizer_of(records: Sequence[Record]) -> PreTrainedTokenizerFast:
    """A tokenizer that is trained on the texts of the records."""
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


if __name__ == "__main__":
    main(sys.argv[1:])
