"""Count the tokens that training and the reference pass compute, and the tokens that they need.

    python -m benchmarks.shared_tokens FILE [FILE …]

The files contain pairs in the format of Anthropic's HH-RLHF. Two other data sets are made of their texts: conversation
trees like OpenAssistant's, in which each question has up to three replies and any reply may be continued, and prompts
with four scored replies like UltraFeedback's. The conversations are formatted in ChatML and tokenised by a byte-level
BPE of 8,000 tokens that is trained on them. The toy world has its own tokenizer.

The first table counts one epoch of training in micro-batches of 8 examples, for each data set, loss and value of
``data.keep_together``:

- separate: a row for each completion, with its prompt;
- prompt: a prompt is computed once for all its completions in the micro-batch;
- tree: the tokens that the model reads. A shared beginning is computed once if it is long enough, and examples of one
  conversation are drawn together;
- needed: every shared beginning is computed once in its micro-batch, even a short one.

The second table counts the reference pass of a tiny model:

- separate: a row for each different completion, with its prompt;
- fed: the tokens that the model reads;
- in its forward, in the data: every shared beginning is computed once in each forward pass, or in the whole data set.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from itertools import takewhile
from operator import eq
from pathlib import Path

from transformers import LlamaForCausalLM

from benchmarks.inputs import llama
from benchmarks.shared_data import CHOSEN, Made, data_sets
from benchmarks.table import table
from halos.data.batches.order import Division, Numbers, TrainingOrder
from halos.data.batches.packing import pack
from halos.data.rows.token_rows import Row
from halos.policy.backbone import Backbone
from halos.policy.logprobs.packed import can_pack
from halos.policy.reference.forwards import Work
from halos.policy.reference.precompute import reference_table

BATCH_SIZE = 8
TRAINING = ("separate", "prompt", "tree", "needed", "tree / needed")
REFERENCE = ("separate", "fed", "in its forward", "in the data", "fed / in the data")
Sequences = set[tuple[int, ...]]


def main(files: list[str]) -> None:
    """Print the tables for these files."""
    training, reference = [], []
    for made in data_sets(files):
        rows = list(made.rows)
        for together in CHOSEN[made.loss]:
            before = list(batches(rows, made.rows.groups, together))
            after = list(batches(rows, made.rows.conversations, together))
            fed = sum(tree_tokens(batch, made.mismatched) for batch in after)
            needed = sum(least_tokens(fed_sequences(batch)) for batch in after)
            counts = (sum(map(separate_tokens, before)), sum(map(prompt_tokens, before)), fed, needed)
            training.append([made.name, made.loss, str(together), *map("{:,}".format, counts), f"{fed / needed:.3f}"])
        reference.append([made.name, made.loss, *reference_counts(made)])
        print(f"{made.name}, {made.loss}: counted", file=sys.stderr, flush=True)
    print(table(("data", "loss", "keep_together", *TRAINING), training), end="\n\n")
    print(table(("data", "loss", *REFERENCE), reference))


def reference_counts(made: Made) -> list[str]:
    """The table's cells for the reference pass over the rows of a data set."""
    policy = LlamaForCausalLM(llama(hidden=16, layers=1, vocabulary=made.vocabulary))
    can_pack(policy)  # tried out on a few tokens, which are not counted
    sizes, works = list[int](), list[Work]()

    def track(listed: Sequence[Work]) -> Iterable[Work]:
        works.extend(listed)
        return listed

    policy.get_input_embeddings().register_forward_pre_hook(lambda _, ids: sizes.append(ids[0].numel()))
    with tempfile.TemporaryDirectory() as folder:
        backbone = Backbone(policy, with_reference=False)
        reference_table(backbone, made.in_order(), folder=Path(folder), precision="32-true", track=track)
    sequences = [fed_sequences(row for _, row in work) for work in works]
    everything = set().union(*sequences)
    separate, fed, least = sum(map(len, everything)), sum(sizes), least_tokens(everything)
    return [*map("{:,}".format, (separate, fed, sum(map(least_tokens, sequences)), least)), f"{fed / least:.3f}"]


def batches(rows: Sequence[Row], groups: Numbers, together: int) -> Iterator[list[Row]]:
    """The micro-batches of a pass in which up to ``together`` examples of a group are drawn together."""
    division = Division(batch_size=BATCH_SIZE, steps=len(rows) // BATCH_SIZE)
    for micro in TrainingOrder(len(rows), division, groups=groups, together=together):
        yield [rows[index] for index in micro.rows]


def separate_tokens(batch: Sequence[Row]) -> int:
    """Tokens of a row for each completion."""
    return sum(len(row.prompt) + len(branch) - 1 for row in batch for branch in row.branches)


def prompt_tokens(batch: Sequence[Row]) -> int:
    """Tokens if a prompt is computed once for all its completions."""
    branches = {(row.prompt, branch) for row in batch for branch in row.branches}
    return sum(map(len, {row.prompt for row in batch})) + sum(len(branch) - 1 for _, branch in branches)


def tree_tokens(batch: Sequence[Row], mismatched: bool) -> int:
    """Tokens that the model reads."""
    width = max(len(branch) for row in batch for branch in row.branches)
    return sum(len(part.input_ids) for part in pack(batch, width=width, mismatched=mismatched))


def fed_sequences(rows: Iterable[Row]) -> Sequences:
    """The prompt and completion of each branch, without the last scored token, which predicts nothing."""
    return {
        (*row.prompt, *branch[: row.scored(place)[-1]]) for row in rows for place, branch in enumerate(row.branches)
    }


def least_tokens(sequences: Sequences) -> int:
    """Tokens if every shared beginning of sequences is computed once."""
    total, before = 0, tuple[int, ...]()
    for sequence in sorted(sequences):  # what a sequence shares with any earlier one, it shares with the last one
        shared = sum(takewhile(bool, map(eq, before, sequence)))
        total, before = total + len(sequence) - shared, sequence
    return total


if __name__ == "__main__":
    main(sys.argv[1:])
