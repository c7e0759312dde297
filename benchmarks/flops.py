"""What a loss needs: tokens, attention between them and scored positions, in floating-point operations.

A prompt is needed once in a micro-step for all its completions, a completion's last token predicts nothing, and KTO's
y' are needed without gradient, on the prompt's keys and values; the reference once over the data.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Self

from halos.data.rows.token_rows import Row


@dataclass(frozen=True, slots=True)
class Work:
    """``tokens`` fed, ``seen``: pairs of tokens of which one attends to the other, ``scored`` positions."""

    tokens: int = 0
    seen: int = 0
    scored: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(self.tokens + other.tokens, self.seen + other.seen, self.scored + other.scored)


@dataclass(frozen=True, slots=True)
class Shape:
    """A decoder: ``weights`` of its layers' matrices, ``layers``, ``width`` of all heads, ``head`` weights."""

    weights: int
    layers: int
    width: int
    head: int

    @classmethod
    def of(cls, model: Any) -> Self:
        """That of a model of transformers."""
        config = model.config.get_text_config()
        heads = config.num_attention_heads
        width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
        tables = {id(model.get_input_embeddings().weight), id(model.get_output_embeddings().weight)}
        weights = sum(p.numel() for p in model.parameters() if p.dim() == 2 and id(p) not in tables)
        return cls(weights, config.num_hidden_layers, width, model.get_output_embeddings().weight.numel())

    def forward(self, work: Work) -> int:
        """Operations of a forward; a backward takes twice as many."""
        # A product with n weights takes 2n operations a token; scores and their use 2 · width each a pair of tokens.
        return 2 * self.weights * work.tokens + 4 * self.layers * self.width * work.seen + 2 * self.head * work.scored


Tree = tuple[tuple[int, ...], tuple[int, ...]]


def work_of(branches: Iterable[Tree], *, known: Iterable[Tree] = ()) -> Work:
    """Work for (prompt, completion)s, each and each prompt once; what is ``known`` costs nothing."""
    known = set(known)
    new = set(branches) - known
    prompts = {prompt for prompt, _ in new} - {prompt for prompt, _ in known}
    work = Work(sum(map(len, prompts)), sum(len(prompt) * (len(prompt) + 1) // 2 for prompt in prompts))
    for prompt, branch in new:
        fed = len(branch) - 1
        work += Work(fed, fed * len(prompt) + fed * (fed + 1) // 2, len(branch))
    return work


@dataclass(frozen=True, slots=True)
class Needs:
    """Work with gradient, work that the loss only reads, and the reference's."""

    trained: Work
    read: Work
    reference: Work

    @property
    def tokens(self) -> int:
        return self.trained.tokens + self.read.tokens + self.reference.tokens

    def operations(self, shape: Shape) -> int:
        return 3 * shape.forward(self.trained) + shape.forward(self.read) + shape.forward(self.reference)


def needs(steps: Sequence[Sequence[Row]], *, mismatched: bool, reference: bool) -> Needs:
    """Of an epoch of micro-steps, whose rows' last branches are y' if ``mismatched``."""
    trained, read = Work(), Work()
    for rows in steps:
        own = {(row.prompt, branch) for row in rows for branch in row.branches[: len(row.branches) - mismatched]}
        trained += work_of(own)
        read += work_of(_all(rows), known=own)
    return Needs(trained, read, work_of(branch for rows in steps for branch in _all(rows)) if reference else Work())


def _all(rows: Sequence[Row]) -> list[Tree]:
    return [(row.prompt, branch) for row in rows for branch in row.branches]
