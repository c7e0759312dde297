"""Packed rows: the prefix tree of a micro-batch, laid end to end without padding.

Sequences share the computation of their common beginning: the completions of one prompt, the examples of one
conversation, prompts with the same long system text (:mod:`halos.data.batches.prefix_tree`). Each sequence is written
without its last token, which predicts nothing. The first token of a completion is predicted from the last token of its
prompt. For the prompt a b c with the completions p q r and s t, and the later prompt a b c s t u with the completion v:

    input_ids   a   b   c   p   q   s   t   u        attends to   a  b  c  p  q  s  t  u
    node        0   0   0   1   1   2   3   3                 a   x
    last        3   3   3   1   1   3   3   3                 b   x  x
    position    0   1   2   3   4   3   4   5                 c   x  x  x
    predicts         p, s   q   r   t       v                 p   x  x  x  x
                                                              q   x  x  x  x  x
                                                              s   x  x  x  .  .  x
                                                              t   x  x  x  .  .  x  x
                                                              u   x  x  x  .  .  x  x  x

Nodes are numbered in preorder. ``last`` is the number of the last node below a node, so node m is node n or below it if
n <= m <= last(n). A token attends to the tokens before it in its own node and to the nodes above. Positions count from
the beginning of a token's sequence. So log-probs and gradients are those of separate rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import torch
from torch import Tensor

from halos.data.batches.prefix_tree import Node, PrefixTree, trained_above, unseen_pairs
from halos.data.rows.token_rows import Row

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

GROUPED_TREES_MAX_TOKENS = 128
"""Trees with up to this many tokens together are attended to in one call: many short calls cost more than the scores
between trees, which the mask throws away."""
DENSE_TREE_MAX_TOKENS = 2048
"""A tree with more tokens is attended to node by node: its mask over all pairs of tokens would be too large."""
DENSE_TREE_MAX_MASKED_PAIRS = 2**14
"""A tree is also attended to node by node if its mask throws away more pairs of tokens than this: computing them costs
more than one call for each node. Such pairs are between different branches, and between a node and those below it."""
TENSORS = ("input_ids", "node", "last", "position", "occurrences", "predicts", "targets", "sources", "slots")
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


class PackNode(NamedTuple):
    """A node of a pack's tree: the number of its tokens, its own number, and that of the last node below it."""

    tokens: int
    number: int
    last: int


@dataclass(slots=True)  # not frozen: Lightning's precision plugins rebuild every dataclass that they find in a batch
class Pack:
    """The N tokens of one forward, the M tokens that they predict, and S places in the grid of completion tokens.

    The keys of attention are these N tokens. If the pack continues the previous one, the P tokens that the previous
    pack keeps come before them (else P = 0). Keys are divided into pieces of consecutive tokens. The last
    ``len(attends)`` pieces are the pack's own tokens. For each of these, ``attends`` lists the pieces that its queries
    attend to.

    Attributes:
        input_ids: [N] tokens to feed.
        node: [P + N] the number of each key's node.
        last: [P + N] the number of the last node below that node (its own number if there is none).
        position: [P + N] the position of each key in its own sequence.
        occurrences: [N] the number of trained sequences that each token is in.
        kept: [P'] the places among the N tokens whose keys the next pack continues.
        predicts: [M] places among the hidden states of this pack and the packs before it.
        targets: [M] the token that each of these states predicts.
        sources: [S] places among the log-probs of this pack and the packs before it.
        slots: [S] the places of these log-probs in the flattened [B, K, C] grid.
        sizes: the number of tokens in each piece.
        attends: for each of the pack's own pieces, the pieces that its queries attend to.
        plain: pieces that are a single sequence from its beginning, without branches: causal attention needs no mask.
        nodes: the nodes of the keys, in their order.
        needs_grad: false for tokens into which no gradient flows, such as KTO's mismatched completions.
    """

    input_ids: Tensor
    node: Tensor
    last: Tensor
    position: Tensor
    occurrences: Tensor
    kept: Tensor
    predicts: Tensor
    targets: Tensor
    sources: Tensor
    slots: Tensor
    sizes: tuple[int, ...]
    attends: tuple[tuple[int, ...], ...]
    plain: tuple[int, ...]
    nodes: tuple[PackNode, ...]
    needs_grad: bool = True

    @property
    def continues(self) -> bool:
        """Whether keys and values come from the pack before."""
        return len(self.sizes) > len(self.attends)


def pack(
    rows: Sequence[Row],
    *,
    width: int,
    mismatched: bool = False,
    share_prompts: bool = True,
    start: int = 0,
    branches: int | None = None,
) -> tuple[Pack, ...]:
    """Pack the rows of a micro-batch.

    Args:
        rows: rows with up to K branches each.
        width: C of the [B, K, C] grid.
        mismatched: the last branch (in a record of several views, the last branches) is KTO's y'. It needs no gradient
            and goes into a second pack.
        share_prompts: write the common beginnings of sequences once, and compute what is predicted from them once. The
            second pack then continues the nodes of the first. If false, every branch has its own copy of the prompt.
        start: the place of the first of these rows in the grid.
        branches: K of the grid; None: all rows have equally many.

    Returns:
        One pack with the trained branches and, with ``mismatched``, one with the mismatched branches.
    """
    tree, ends = PrefixTree(share=share_prompts), dict[tuple[int, int], Node]()
    places, others = divided_places(rows, mismatched=mismatched)
    for is_trained, own in ((True, places), (False, others)):
        for b, k in own:
            ends[b, k] = tree.add(rows[b].prompt, _fed(rows[b], k), trained=is_trained)
    nodes = tree.nodes()
    for place in places:
        for node in ends[place].path():
            node.sequences += 1
    above = list(trained_above(nodes))
    scores = _Scores(rows, width, start, branches or len(rows[0].branches), ends)
    first = _Writer(scores)
    for node in tree.root.own_children():
        first.write([node], [])
    packs = (first.finish(places, above),)
    if not mismatched:
        return packs
    second = _Writer(scores, above, len(first.input_ids))
    for node in tree.root.children:
        if not node.trained:
            second.write([node], [])
    for node in above:
        if mismatched_children := [child for child in node.children if not child.trained]:
            second.write(mismatched_children, second.pieces_of(node))
    return (*packs, second.finish(others))


def divided_places(rows: Sequence[Row], *, mismatched: bool) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Return the places (b, k) of the branches that are trained, and of those that are not (:func:`pack`)."""
    trained = [len(row.branches) - (row.mismatched if row.views else mismatched) for row in rows]
    places = [[(b, k) for k in range(len(row.branches))] for b, row in enumerate(rows)]
    first = [place for own, count in zip(places, trained, strict=True) for place in own[:count]]
    return first, [place for own, count in zip(places, trained, strict=True) for place in own[count:]]


@dataclass(slots=True)
class _Scores:
    """Maps places of the grid to log-probs. The log-prob of one token after one state is computed only once.

    Attributes:
        rows: the rows of the micro-batch.
        width: C of the [B, K, C] grid.
        start: the place of the first row in the grid.
        branches: K of the grid.
        ends: the node at the end of each branch (b, k).
        known: for each (state, token), the place of its log-prob among the log-probs of all packs.
    """

    rows: Sequence[Row]
    width: int
    start: int
    branches: int
    ends: dict[tuple[int, int], Node]
    known: dict[tuple[int, int], int] = field(default_factory=dict)

    def add(self, writer: _Writer, b: int, k: int) -> None:
        """Record the places of a branch whose nodes are written."""
        row, path = self.rows[b], self.ends[b, k].path()
        states = [place for node in path for place in range(node.place, node.place + len(node.ids))]
        slot, scored = ((self.start + b) * self.branches + k) * self.width, row.scored(k)
        # The state of the prompt's last token predicts the branch's first one.
        states = states[len(row.prompt) - 1 :]
        for pair in ((states[n], row.branches[k][n]) for n in scored):
            if pair not in self.known:
                self.known[pair] = len(self.known)
                writer.predicts.append(pair[0])
                writer.targets.append(pair[1])
            writer.sources.append(self.known[pair])
        writer.slots += range(slot, slot + len(scored))


class _Writer:
    """Writes the nodes of one pack, and records their places. Its lists become the tensors of a :class:`Pack`.

    Args:
        scores: the places of log-probs.
        earlier: the nodes whose keys come from the pack before; each is a piece.
        states_before: the number of states of the pack before; places among states continue from there.

    Attributes:
        open_tokens: the number of tokens in the open piece, those written since the last piece was closed.
        open_attends: the pieces that these tokens attend to, in addition to their own.
    """

    def __init__(self, scores: _Scores, earlier: Sequence[Node] | None = None, states_before: int = 0) -> None:
        self.scores, self.states_before, self.needs_grad = scores, states_before, earlier is None
        self.input_ids, self.node, self.last, self.position, self.occurrences = (list[int]() for _ in range(5))
        self.predicts, self.targets, self.sources, self.slots, self.plain = (list[int]() for _ in range(5))
        self.attends: list[tuple[int, ...]] = []
        self.nodes: list[PackNode] = []
        self.open_tokens, self.open_attends = 0, list[int]()
        for node in earlier or ():
            self._add_keys(node)
        self.sizes = [len(node.ids) for node in earlier or ()]
        self._pieces = {node.number: piece for piece, node in enumerate(earlier or ())}

    def pieces_of(self, node: Node) -> list[int]:
        """The pieces from the root to a node of the pack before."""
        return [self._pieces[above.number] for above in node.path() if above.parent is not None]

    def write(self, siblings: Sequence[Node], attends: Sequence[int]) -> None:
        """Write nodes and what is below them.

        Args:
            siblings: nodes with one parent.
            attends: the pieces of the nodes above them.
        """
        waiting = [(list(siblings), list(attends))]
        while waiting:
            nodes, attends = waiting.pop()
            if _are_one_piece(nodes):
                self._write_together(nodes, attends)
            elif len(nodes) > 1:
                waiting += [([node], attends) for node in reversed(nodes)]
            else:
                # The nodes up to the next branching become a piece, to which everything below attends.
                self._close()
                node = nodes[0]
                self._add(node)
                while len(node.own_children()) == 1:
                    node = node.own_children()[0]
                    self._add(node)
                self.open_attends = list(attends)
                self._close()
                waiting.append((node.own_children(), [*attends, len(self.sizes) - 1]))

    def finish(self, places: Sequence[tuple[int, int]], kept: Sequence[Node] = ()) -> Pack:
        """The pack of everything that was written.

        Args:
            places: the branches (b, k) whose log-probs it has.
            kept: the nodes whose keys the next pack continues.
        """
        if not self.input_ids:
            # All states were computed in the pack before. A forward must run even so: collectives of sharded models
            # hang if one rank runs fewer than the others.
            self._add(Node((0,)))
        self._close()
        for b, k in places:
            self.scores.add(self, b, k)
        # The dtype is explicit, as torch turns an empty list into a float tensor.
        tensors = {name: torch.tensor(getattr(self, name), dtype=torch.long) for name in TENSORS}
        kept_places = [place for node in kept for place in range(node.place, node.place + len(node.ids))]
        return Pack(
            **tensors,
            kept=torch.tensor(kept_places, dtype=torch.long),
            sizes=tuple(self.sizes),
            attends=tuple(self.attends),
            plain=tuple(self.plain),
            nodes=tuple(self.nodes),
            needs_grad=self.needs_grad,
        )

    def _write_together(self, nodes: list[Node], attends: list[int]) -> None:
        size = sum(node.size for node in nodes)
        # Short trees share a piece, which is one call of attention, until it is full. Keys of the pieces above that the
        # open piece attends to count as well.
        above = [] if self.open_attends == attends else self.open_attends
        if size + self.open_tokens + sum(self.sizes[piece] for piece in above) > GROUPED_TREES_MAX_TOKENS:
            self._close()
        self.open_attends += [piece for piece in attends if piece not in self.open_attends]
        waiting = nodes[::-1]
        while waiting:
            node = waiting.pop()
            self._add(node)
            waiting += reversed(node.own_children())

    def _add(self, node: Node) -> None:
        node.place = self.states_before + len(self.input_ids)
        self.input_ids += node.ids
        self.occurrences += [node.sequences] * len(node.ids)
        self.open_tokens += len(node.ids)
        self._add_keys(node)

    def _add_keys(self, node: Node) -> None:
        self.nodes.append(PackNode(len(node.ids), node.number, node.last))
        self.node += [node.number] * len(node.ids)
        self.last += [node.last] * len(node.ids)
        self.position += range(node.position, node.position + len(node.ids))

    def _close(self) -> None:
        """Close the open piece, which holds the tokens that were written since the last piece."""
        if self.open_tokens:
            # Positions that count up from 0 are one sequence: a second branch or tree would start from a lower number.
            if self.position[-self.open_tokens :] == list(range(self.open_tokens)):
                self.plain.append(len(self.sizes))
            self.attends.append((*self.open_attends, len(self.sizes)))
            self.sizes.append(self.open_tokens)
        self.open_tokens, self.open_attends = 0, []


def _fed(row: Row, branch: int) -> tuple[int, ...]:
    """The tokens of a completion before the last scored one, which predicts nothing."""
    return row.branches[branch][: row.scored(branch)[-1]]


def _are_one_piece(siblings: Sequence[Node]) -> bool:
    """Whether siblings and what is below them are attended to in one call."""
    pairs = unseen_pairs(siblings)
    size = sum(node.size for node in siblings)
    return not pairs or (size <= DENSE_TREE_MAX_TOKENS and pairs <= DENSE_TREE_MAX_MASKED_PAIRS)
