"""``python -m benchmarks.head_bytes``: the bytes that the LM head moves for a scored token, next to the least possible.

Each operation of PyTorch counts by what it reads and writes, wherever that lies: the float32 copy of a block of rows
may never leave a GPU's cache. The counts are those of :mod:`halos.policy.logprobs.chunked_head` on CUDA, with
gradients of states and weight. A test compares them with traced operations.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.table import table

FLOAT32 = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """A head and its scored tokens.

    Attributes:
        tokens: scored tokens M of a micro-batch.
        hidden: width H of a state.
        vocabulary: V.
        itemsize: bytes of a number in states, weight and logits: 2 in bfloat16, 4 in float32.
    """

    tokens: int
    hidden: int
    vocabulary: int
    itemsize: int

    @property
    def states(self) -> int:
        """Numbers in all states."""
        return self.tokens * self.hidden

    @property
    def weight(self) -> int:
        """Numbers in the weight."""
        return self.hidden * self.vocabulary

    @property
    def logits(self) -> int:
        """Numbers in all logits."""
        return self.tokens * self.vocabulary


@dataclass(frozen=True, slots=True)
class Moved:
    """Bytes for each scored token.

    Attributes:
        logits: read and written as logits, their float32 copies and their gradients.
        weights: read and written as the head's weight and its gradient.
        states: read and written as states and their gradients.
    """

    logits: float
    weights: float
    states: float

    @property
    def total(self) -> float:
        return self.logits + self.weights + self.states


def moved(head: Head, rows: int) -> Moved:
    """Return what forward and backward pass move, in chunks of ``rows`` rows."""
    size, chunks = head.itemsize, -(-head.tokens // rows)
    first = min(rows, head.tokens) * head.vocabulary  # its logits are kept, and not computed again
    converted = (size + FLOAT32) * head.logits if size < FLOAT32 else 0
    logits = (
        size * head.logits  # product
        + converted
        + 2 * FLOAT32 * head.logits  # log_softmax
        + size * (head.logits - first)  # product again
        + (size + FLOAT32) * head.logits  # minus the normaliser, in float32
        + 2 * FLOAT32 * head.logits  # exp, in place
        + (FLOAT32 + size) * head.logits  # times the gradient, written over the logits
        + 2 * size * head.logits  # two products read it
    )
    # A product is added to the gradient in one operation in float32, and in two where it has to be converted.
    added = 2 * FLOAT32 if size == FLOAT32 else 2 * size + 2 * FLOAT32
    weights = (
        size * head.weight * (chunks + chunks - 1 + chunks)  # read in each chunk, for logits twice and for states
        + added * head.weight * chunks
        + FLOAT32 * head.weight  # zeros that the gradient starts from
        + (FLOAT32 + size if size < FLOAT32 else 0) * head.weight  # and its conversion
    )
    again = head.tokens - min(rows, head.tokens)
    states = (
        size * (head.states + again * head.hidden + head.states)  # read for logits, again, and for the weight
        + size * head.states  # the product that is their gradient
        + FLOAT32 * head.states  # zeros
        + (size + 2 * FLOAT32 if size < FLOAT32 else 0) * head.states  # converted
        + 2 * FLOAT32 * head.states  # copied to their place
        + (size if size < FLOAT32 else 0) * head.states  # and converted back
    )
    return Moved(logits / head.tokens, weights / head.tokens, states / head.tokens)


def least(head: Head) -> Moved:
    """Return what the same products move if each number is read and written once for each of them, in one chunk.

    Logits are written, read for their normaliser, read and overwritten by their gradient, and read by two products. The
    weight is read by two, and its gradient is written once in float32.
    """
    size = head.itemsize
    weights = (2 * size + FLOAT32) * head.weight
    return Moved(6 * size * head.vocabulary, weights / head.tokens, 3 * size * head.hidden)


MODELS = {
    "SmolLM2-135M": (576, 49_152),
    "Mistral 7B": (4096, 32_000),
    "Llama 3 8B": (4096, 128_256),
}
"""Width and vocabulary of heads."""


def main(words: Sequence[str] | None = None) -> None:
    """Print the table."""
    options = argparse.ArgumentParser("benchmarks.head_bytes", description=__doc__)
    options.add_argument("--tokens", type=int, default=8192, help="scored tokens of a micro-batch")
    options.add_argument("--rows", type=int, nargs="+", default=[512, 4096])
    chosen = options.parse_args(words)
    print(bytes_table(chosen.tokens, chosen.rows))


def bytes_table(tokens: int, chunks: Sequence[int]) -> str:
    """Return MB for each token in bfloat16, of each model and number of rows."""
    lines = []
    for name, (hidden, vocabulary) in MODELS.items():
        head = Head(tokens=tokens, hidden=hidden, vocabulary=vocabulary, itemsize=2)
        counts = {f"{rows:,}": moved(head, rows) for rows in chunks} | {"least": least(head)}
        for rows, count in counts.items():
            lines.append([name, rows, *(f"{part / 1e6:.2f}" for part in (count.logits, count.weights, count.total))])
    return table(("head", "rows of a chunk", "logits, MB", "weight, MB", "all, MB"), lines)


if __name__ == "__main__":
    main()
