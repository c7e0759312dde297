"""Packed rows: every prompt once, followed by all its completions, without padding.

A tree is one prompt with the completions (branches) that a micro-batch has for it: chosen and rejected, several
examples of one prompt, y and the mismatched y'. Each branch is written without its last token, which predicts nothing.
Its first token is predicted from the last token of the prompt. For the prompt a b c with the branches p q r and s t:

    input_ids   a   b   c   p   q   s          attends to   a  b  c  p  q  s
    branch     -1  -1  -1   1   1   2                   a   x
    position    0   1   2   3   4   3                   b   x  x
    predicts         p, s   q   r   t                   c   x  x  x
                                                        p   x  x  x  x
                                                        q   x  x  x  x  x
                                                        s   x  x  x  .  .  x

Positions of every branch continue those of the prompt, and a token attends to the prompt and to its own branch only, so
log-probs and gradients are those of separate rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from halos.data.rows.token_rows import Row

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

PROMPT = -1
"""The number of the prompt in ``branch``; branches count from 1."""
GROUPED_TREES_MAX_TOKENS = 128
"""Trees with up to this many tokens together are attended to in one call: many short calls cost more than the scores
between trees, which the mask throws away."""
DENSE_TREE_MAX_TOKENS = 2048
"""A tree with more tokens is attended to branch by branch: its mask over all pairs of tokens would be too large."""
DENSE_TREE_MAX_MASKED_PAIRS = 2**14
"""A tree is also attended to branch by branch if its mask throws away more pairs of tokens than this: computing them
costs more than one call for each branch. Such pairs are between different branches, and between a prompt and the
branches after it."""
TENSORS = ("input_ids", "tree", "branch", "position", "prompts", "predicts", "targets", "sources", "slots")
"""The lists of :class:`_Writer` that become tensors of :class:`Pack`, under the same names."""

D = TypeVar("D", bound="DataclassInstance")


def map_tensors(instance: D, function: Callable[[Tensor], Tensor]) -> D:
    """Copy a dataclass instance, with the function applied to every tensor in it and in the instances it holds."""

    def mapped(value: object) -> object:
        if isinstance(value, Tensor):
            return function(value)
        if isinstance(value, tuple) and value and is_dataclass(value[0]):  # other tuples hold ids and numbers
            return tuple(map(mapped, value))
        return map_tensors(value, function) if is_dataclass(value) and not isinstance(value, type) else value

    return replace(instance, **{item.name: mapped(getattr(instance, item.name)) for item in fields(instance)})


@dataclass(slots=True)  # not frozen: Lightning's precision plugins rebuild every dataclass that they find in a batch
class Pack:
    """The N tokens of one forward, the M tokens that they predict, and S places in the grid of completion tokens.

    The keys of attention are these N tokens. If the pack continues the previous one, the P prompt tokens of the
    previous pack come before them (else P = 0). Keys are divided into pieces of consecutive tokens. The last
    ``len(attends)`` pieces are the pack's own tokens, and the queries of each of these attend to the pieces that
    ``attends`` lists for it.

    Attributes:
        input_ids: [N] tokens to feed.
        tree: [P + N] the number of each key's tree.
        branch: [P + N] the number of each key's branch, or :data:`PROMPT`.
        position: [P + N] the position of each key in its own sequence.
        prompts: [P'] the places of prompt tokens among the N tokens.
        predicts: [M] places among the hidden states of this pack and the packs before it.
        targets: [M] the token that each of these states predicts.
        sources: [S] places among the log-probs of this pack and the packs before it.
        slots: [S] the places of these log-probs in the flattened [B, K, C] grid.
        sizes: the number of tokens in each piece.
        attends: for each of the pack's own pieces, the pieces that its queries attend to.
        plain: pieces that are a single sequence from its beginning, without branches: causal attention needs no mask.
        needs_grad: false for tokens that the loss only reads, such as KTO's mismatched completions.
    """

    input_ids: Tensor
    tree: Tensor
    branch: Tensor
    position: Tensor
    prompts: Tensor
    predicts: Tensor
    targets: Tensor
    sources: Tensor
    slots: Tensor
    sizes: tuple[int, ...]
    attends: tuple[tuple[int, ...], ...]
    plain: tuple[int, ...]
    needs_grad: bool = True

    @property
    def continues(self) -> bool:
        """Whether the keys and values of the prompts come from the pack before."""
        return len(self.sizes) > len(self.attends)


def pack(
    rows: Sequence[Row], *, width: int, mismatched: bool = False, share_prompts: bool = True, start: int = 0
) -> tuple[Pack, ...]:
    """Pack the rows of a micro-batch.

    Args:
        rows: rows with K branches each.
        width: C of the [B, K, C] grid.
        mismatched: the last branch is KTO's y'. It needs no gradient and gets a second pack.
        share_prompts: write each prompt once; the second pack then continues the prompts of the first, and a completion
            that a prompt has twice is scored once. If false, every branch has its own copy of the prompt.
        start: the place of the first of these rows in the grid.

    Returns:
        One pack with the trained branches and, with ``mismatched``, one with the mismatched branches.
    """
    last = len(rows[0].branches) - 1
    trained = [(b, k) for b in range(len(rows)) for k in range(last + 1 - mismatched)]
    first = _Writer(rows, width, share_prompts, start)
    trees = first.write({}, trained)
    if not mismatched:
        return (first.finish(),)
    second = first.continued()
    second.write(trees if share_prompts else {}, [(b, last) for b in range(len(rows))])
    return (first.finish(), second.finish())


def divide(rows: Sequence[Row], max_tokens: int | None, *, share_prompts: bool = True) -> list[slice]:
    """Divide rows into consecutive parts of up to ``max_tokens`` tokens each, as they are packed.

    The tokens of all branches count. A row with more tokens is a part of its own. None: all rows are one part.
    """
    edges, tokens = [0], 0
    prompts: set[tuple[int, ...]] = set()
    for number, row in enumerate(rows):
        shared = share_prompts and row.prompt in prompts
        copies = 1 if share_prompts else len(row.branches)
        completion_tokens = sum(map(len, row.branches))
        size = completion_tokens + (0 if shared else len(row.prompt) * copies)
        if max_tokens and tokens and tokens + size > max_tokens:
            edges.append(number)
            prompts.clear()
            # The part before had the prompt; this one needs a copy of its own.
            tokens, size = 0, size + (len(row.prompt) if shared else 0)
        tokens += size
        prompts.add(row.prompt)
    return [slice(start, end) for start, end in pairwise([*edges, len(rows)])]


@dataclass(slots=True)
class _Tree:
    """A prompt that a writer has written, and the places of its branches.

    Attributes:
        number: the number of the tree.
        prompt: its token ids.
        last: the place of the prompt's last token among the states of all packs.
        scored: for each branch, the place of its first log-prob among the log-probs of all packs.
    """

    number: int
    prompt: tuple[int, ...]
    last: int
    scored: dict[tuple[int, ...], int] = field(default_factory=dict)


_Trees = dict[tuple[int, ...], _Tree]
"""Trees by the token ids of their prompt or, where prompts are not shared, by the place (b, k) of their branch."""


@dataclass(slots=True)
class _Writer:
    """Writes the trees of one pack one after the other, and records places as it goes.

    The lists without a description are those of :class:`Pack`.

    Attributes:
        rows: the rows of the micro-batch.
        width: C of the [B, K, C] grid.
        share_prompts: write each prompt once.
        start: the place of the first row in the grid.
        needs_grad: whether the loss trains these tokens.
        states_before: the number of states of the previous pack, which places among states continue.
        logprobs_before: the number of its log-probs, likewise.
        open_tokens: tokens of the open piece: those that were written since the last piece was closed.
        open_attends: the pieces that they attend to besides their own.
    """

    rows: Sequence[Row]
    width: int
    share_prompts: bool
    start: int
    needs_grad: bool = True
    states_before: int = 0
    logprobs_before: int = 0
    input_ids: list[int] = field(default_factory=list)
    tree: list[int] = field(default_factory=list)
    branch: list[int] = field(default_factory=list)
    position: list[int] = field(default_factory=list)
    prompts: list[int] = field(default_factory=list)
    predicts: list[int] = field(default_factory=list)
    targets: list[int] = field(default_factory=list)
    sources: list[int] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    attends: list[tuple[int, ...]] = field(default_factory=list)
    plain: list[int] = field(default_factory=list)
    open_tokens: int = 0
    open_attends: list[int] = field(default_factory=list)

    def continued(self) -> _Writer:
        """The writer of the next pack, whose tokens the loss only reads. It begins with the keys of shared prompts."""
        places = (len(self.input_ids), len(self.targets))
        writer = _Writer(self.rows, self.width, self.share_prompts, self.start, False, *places)
        if self.share_prompts:
            for name in ("tree", "branch", "position"):
                setattr(writer, name, [getattr(self, name)[place] for place in self.prompts])
            # Piece n is the prompt of tree n.
            writer.sizes = [writer.tree.count(number) for number in range(writer.tree[-1] + 1)]
        return writer

    def write(self, trees: _Trees, places: Sequence[tuple[int, int]]) -> _Trees:
        """Write branches, each after its prompt unless the prompt is already written.

        Args:
            trees: the trees that are already written; new ones are added.
            places: the places (b, k) of the branches in the grid.
        """
        # All branches of a prompt have to follow it at once, so they are collected first. The inner dict is an ordered
        # set: a branch that occurs twice is written once.
        branches_of: dict[tuple[int, ...], dict[tuple[int, ...], None]] = {}
        for b, k in places:
            branches_of.setdefault(self._key(b, k), {})[self.rows[b].branches[k]] = None
        for key, branches in branches_of.items():
            prompt = key if self.share_prompts else self.rows[key[0]].prompt
            trees[key] = self._write_tree(trees.get(key), len(trees), prompt, list(branches))
        if not self.input_ids:
            # Every branch has one token, which the prompt predicts, or was scored before. A forward has to run all the
            # same: collectives of sharded models hang if one rank runs fewer than the others.
            self._add([0], -1, PROMPT, 0)
        # Places are recorded once all branches are written: a completion that occurs twice is scored in one place.
        self._close()
        for b, k in places:
            ids = self.rows[b].branches[k]
            source = trees[self._key(b, k)].scored[ids]
            slot = ((self.start + b) * len(self.rows[b].branches) + k) * self.width
            self.sources += range(source, source + len(ids))
            self.slots += range(slot, slot + len(ids))
        return trees

    def finish(self) -> Pack:
        """The pack of everything that was written."""
        # The dtype is explicit, as torch turns an empty list into a float tensor.
        tensors = {name: torch.tensor(getattr(self, name), dtype=torch.long) for name in TENSORS}
        sizes, attends, plain = tuple(self.sizes), tuple(self.attends), tuple(self.plain)
        return Pack(**tensors, sizes=sizes, attends=attends, plain=plain, needs_grad=self.needs_grad)

    def _key(self, b: int, k: int) -> tuple[int, ...]:
        return self.rows[b].prompt if self.share_prompts else (b, k)

    def _write_tree(
        self, tree: _Tree | None, number: int, prompt: tuple[int, ...], branches: list[tuple[int, ...]]
    ) -> _Tree:
        new = [ids for ids in branches if tree is None or ids not in tree.scored]
        lengths = [len(ids) - 1 for ids in new]
        total = sum(lengths)
        size = len(prompt) + total
        # Short trees share a piece, which is one call of attention, until it is full.
        if size + self.open_tokens + sum(self.sizes[piece] for piece in self.open_attends) > GROUPED_TREES_MAX_TOKENS:
            self._close()
        # Pairs of tokens that a mask over the whole tree would throw away: those between different branches and, if the
        # prompt is in this pack, those between its queries and the branches' keys.
        masked_pairs = sum(length * (total - length) for length in lengths)
        if tree is None:
            masked_pairs += len(prompt) * total
        separately = len(new) > 1 and (size > DENSE_TREE_MAX_TOKENS or masked_pairs > DENSE_TREE_MAX_MASKED_PAIRS)
        attends: list[int] = []
        if tree is not None:
            attends = [tree.number]  # the prompt's keys come from the pack before: piece n is the prompt of tree n
        else:
            tree = _Tree(number, prompt, self.states_before + len(self.input_ids) + len(prompt) - 1)
            self.prompts += range(len(self.input_ids), len(self.input_ids) + len(prompt))
            self._add(prompt, number, PROMPT, 0)
            if separately:
                attends = [len(self.sizes)]  # the prompt becomes a piece, to which each branch attends
                self._close()
        for ids in new:
            self._write_branch(tree, ids, attends)
            if separately:
                self._close()
        return tree

    def _write_branch(self, tree: _Tree, ids: tuple[int, ...], attends: list[int]) -> None:
        start = self.states_before + len(self.input_ids)
        self.predicts += [tree.last, *range(start, start + len(ids) - 1)]
        tree.scored[ids] = self.logprobs_before + len(self.targets)
        self.targets += ids
        self._add(ids[:-1], tree.number, len(tree.scored), len(tree.prompt))
        # A branch of one token adds no query, so it attends to nothing.
        self.open_attends += [piece for piece in attends if len(ids) > 1 and piece not in self.open_attends]

    def _add(self, ids: Sequence[int], tree: int, branch: int, position: int) -> None:
        self.input_ids += ids
        self.tree += [tree] * len(ids)
        self.branch += [branch] * len(ids)
        self.position += range(position, position + len(ids))
        self.open_tokens += len(ids)

    def _close(self) -> None:
        """Close the open piece, which holds the tokens that were written since the last piece."""
        if self.open_tokens:
            # Positions that count up from 0 belong to one sequence: a second tree or branch would begin anew.
            if self.position[-self.open_tokens :] == list(range(self.open_tokens)):
                self.plain.append(len(self.sizes))
            self.attends.append((*self.open_attends, len(self.sizes)))
            self.sizes.append(self.open_tokens)
        self.open_tokens, self.open_attends = 0, []
