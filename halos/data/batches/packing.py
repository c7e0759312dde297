"""Rows packed end to end: each prompt once, followed by all its completions, without padding.

A tree is one prompt with the completions (branches) that a micro-batch has for it: chosen and rejected, several
examples of one prompt, y and the mismatched y'. Its tokens are the prompt's, then each branch's without its last one,
which predicts nothing; the first token of every branch is predicted from the prompt's last place. Positions restart
behind the prompt for each branch, and a token sees the prompt and the branch that it is in: log-probs and gradients are
those of separate rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from halos.data.rows.token_rows import Row

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

PROMPT = -1
"""The number, among branches, of the prompt."""
GROUPED = 128
"""Trees that have no more tokens than this together are attended to in one call: short calls cost more than masked
scores."""
DENSE = 2048
"""A tree with more tokens is attended to branch by branch: its mask over all pairs of tokens would grow too large."""
UNSEEN = 2**14
"""So is one in which more pairs of tokens are in different branches, or a branch and the prompt before it: they cost
more than further calls."""


Bundle = TypeVar("Bundle", bound="DataclassInstance")


def map_tensors(bundle: Bundle, function: Callable[[Tensor], Tensor]) -> Bundle:
    """A copy of a dataclass with the function applied to every field that is a tensor."""
    values = {item.name: getattr(bundle, item.name) for item in fields(bundle)}
    return replace(bundle, **{name: function(value) for name, value in values.items() if isinstance(value, Tensor)})


@dataclass(slots=True)  # not frozen: Lightning's precision plugins rebuild every dataclass that they find in a batch
class Pack:
    """N tokens for one forward, the M tokens that they predict, and S places in the grid of completion tokens.

    ``input_ids`` [N]. Keys are these tokens and, before them, the P prompt tokens of the pack before, if this one
    continues them (else P = 0): ``tree``, ``branch`` and ``position`` [P + N] say what each is. Keys come in pieces of
    ``sizes`` tokens; the last ``len(attends)`` pieces are the pack's own tokens, and the queries of each of those
    attend to the pieces that ``attends`` lists. ``plain`` are pieces that are one sequence, from its beginning and
    without branches. ``prompts`` [P'] are the places of prompt tokens.

    ``predicts`` [M] are places among the states of all packs so far, ``targets`` [M] the tokens predicted there.
    ``sources`` [S] are places among the log-probs of all packs so far, ``slots`` [S] those in the flattened [B, K, C]
    grid. ``needs_grad`` is false for packs that the loss only reads, such as KTO's mismatched completions.
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
        """Whether the prompts' keys and values come from the pack before."""
        return len(self.sizes) > len(self.attends)

    def map(self, function: Callable[[Tensor], Tensor]) -> Pack:
        """A copy with the function applied to every tensor."""
        return map_tensors(self, function)


def pack(
    rows: Sequence[Row], *, width: int, mismatched: bool = False, share_prompts: bool = True, start: int = 0
) -> tuple[Pack, ...]:
    """One pack with the branches that are trained and, if the last branch is ``mismatched``, one with those.

    ``width`` is C of the [B, K, C] grid, and ``start`` the place in it of the first of these rows. With
    ``share_prompts`` the second pack continues the prompts of the first, and completions that a prompt has twice are
    scored once; without, every branch has a prompt of its own.
    """
    last = len(rows[0].branches) - 1
    trained = [(b, k) for b in range(len(rows)) for k in range(last + 1 - mismatched)]
    first = _Writer(rows, width, start=start)
    trees = first.write({}, trained, share_prompts)
    if not mismatched:
        return (first.finish(),)
    second = _Writer(rows, width, needs_grad=False, behind=first, start=start)
    if share_prompts:
        second.continue_prompts(first)
    second.write(trees if share_prompts else {}, [(b, last) for b in range(len(rows))], share_prompts)
    return (first.finish(), second.finish())


def divide(rows: Sequence[Row], most: int, *, share_prompts: bool = True) -> list[slice]:
    """Stretches of rows that have at most so many tokens, all branches counted, when they are packed; a row that has
    more is a stretch by itself."""
    edges, tokens = [0], 0
    prompts: set[tuple[int, ...]] = set()
    for number, row in enumerate(rows):
        branches = sum(map(len, row.branches))
        known = share_prompts and row.prompt in prompts
        size = branches + (0 if known else len(row.prompt) * (1 if share_prompts else len(row.branches)))
        if tokens and tokens + size > most:
            edges.append(number)
            prompts.clear()
            tokens, size = 0, size + (len(row.prompt) if known else 0)
        tokens += size
        prompts.add(row.prompt)
    return [slice(a, z) for a, z in pairwise([*edges, len(rows)])]


@dataclass(slots=True)
class _Tree:
    """A prompt, its place in the packs, and where the log-probs of each of its branches begin."""

    number: int
    prompt: tuple[int, ...]
    last: int
    scored: dict[tuple[int, ...], int] = field(default_factory=dict)


_Trees = dict[Any, _Tree]


class _Writer:
    """Writes trees one after the other, and notes places as it goes."""

    def __init__(
        self,
        rows: Sequence[Row],
        width: int,
        *,
        needs_grad: bool = True,
        behind: _Writer | None = None,
        start: int = 0,
    ) -> None:
        self.rows, self.width, self.needs_grad, self.start = rows, width, needs_grad, start
        self.states = 0 if behind is None else len(behind.ids)
        self.logprobs = 0 if behind is None else len(behind.targets)
        self.ids: list[int] = []
        self.tree: list[int] = []
        self.branch: list[int] = []
        self.position: list[int] = []
        self.prompts: list[int] = []
        self.predicts: list[int] = []
        self.targets: list[int] = []
        self.sources: list[int] = []
        self.slots: list[int] = []
        self.sizes: list[int] = []
        self.attends: list[tuple[int, ...]] = []
        self.plain: list[int] = []
        self._open = 0  # tokens behind the last piece
        self._reads: list[int] = []  # pieces of the pack before that they attend to

    def continue_prompts(self, first: _Writer) -> None:
        """Begin with the keys of the first pack's prompts: piece n is the prompt of tree n."""
        for name in ("tree", "branch", "position"):
            setattr(self, name, [getattr(first, name)[place] for place in first.prompts])
        self.sizes = [self.tree.count(number) for number in range(self.tree[-1] + 1)]

    def write(self, trees: _Trees, places: Sequence[tuple[int, int]], share: bool) -> _Trees:
        """Write the branches at these places (b, k) of the grid, with their prompts unless the trees have them."""
        wanted: dict[Any, dict[tuple[int, ...], None]] = {}
        for b, k in places:
            key = self.rows[b].prompt if share else (b, k)
            wanted.setdefault(key, {})[self.rows[b].branches[k]] = None
        for key, branches in wanted.items():
            prompt = key if share else self.rows[key[0]].prompt
            trees[key] = self._write_tree(trees.get(key), len(trees), prompt, list(branches))
        if not self.ids:
            self._add([0], -1, PROMPT, 0)  # nothing to feed, but every rank runs as many forwards as the others
        self._close()
        for b, k in places:
            ids = self.rows[b].branches[k]
            source = trees[self.rows[b].prompt if share else (b, k)].scored[ids]
            slot = ((self.start + b) * len(self.rows[b].branches) + k) * self.width
            self.sources += range(source, source + len(ids))
            self.slots += range(slot, slot + len(ids))
        return trees

    def finish(self) -> Pack:
        def tensor(values: list[int]) -> Tensor:
            return torch.tensor(values, dtype=torch.long)

        return Pack(
            input_ids=tensor(self.ids),
            tree=tensor(self.tree),
            branch=tensor(self.branch),
            position=tensor(self.position),
            prompts=tensor(self.prompts),
            predicts=tensor(self.predicts),
            targets=tensor(self.targets),
            sources=tensor(self.sources),
            slots=tensor(self.slots),
            sizes=tuple(self.sizes),
            attends=tuple(self.attends),
            plain=tuple(self.plain),
            needs_grad=self.needs_grad,
        )

    def _write_tree(
        self, tree: _Tree | None, number: int, prompt: tuple[int, ...], branches: list[tuple[int, ...]]
    ) -> _Tree:
        new = [ids for ids in branches if tree is None or ids not in tree.scored]
        lengths = [len(ids) - 1 for ids in new]
        total = sum(lengths)
        size = len(prompt) + total
        if size + self._open + sum(self.sizes[piece] for piece in self._reads) > GROUPED:
            self._close()
        unseen = sum(length * (total - length) for length in lengths) + (len(prompt) * total if tree is None else 0)
        apart = len(new) > 1 and (size > DENSE or unseen > UNSEEN)
        reads: list[int] = []
        if tree is not None:
            reads = [tree.number]
        else:
            tree = _Tree(number, prompt, self.states + len(self.ids) + len(prompt) - 1)
            self.prompts += range(len(self.ids), len(self.ids) + len(prompt))
            self._add(prompt, number, PROMPT, 0)
            if apart:
                reads = [len(self.sizes)]
                self._close()
        for ids in new:
            self._write_branch(tree, ids, reads)
            if apart:
                self._close()
        return tree

    def _write_branch(self, tree: _Tree, ids: tuple[int, ...], reads: list[int]) -> None:
        start = self.states + len(self.ids)
        self.predicts += [tree.last, *range(start, start + len(ids) - 1)]
        tree.scored[ids] = self.logprobs + len(self.targets)
        self.targets += ids
        self._add(ids[:-1], tree.number, len(tree.scored), len(tree.prompt))
        self._reads += [piece for piece in reads if len(ids) > 1 and piece not in self._reads]

    def _add(self, ids: Sequence[int], tree: int, branch: int, position: int) -> None:
        self.ids += ids
        self.tree += [tree] * len(ids)
        self.branch += [branch] * len(ids)
        self.position += range(position, position + len(ids))
        self._open += len(ids)

    def _close(self) -> None:
        if self._open:
            if self.position[-self._open :] == list(range(self._open)):
                self.plain.append(len(self.sizes))
            self.attends.append((*self._reads, len(self.sizes)))
            self.sizes.append(self._open)
        self._open, self._reads = 0, []
