"""The prefix tree of the sequences in a micro-batch: the common beginning of several sequences is one node.

A judgement on an earlier turn of a conversation is an example of its own, whose prompt is the beginning of the prompts
of later examples. Here the prompt x has the replies y and z. After y the user says u, to which the replies are a and b;
after a the user says v, to which the reply is e:

    x ─┬─ y ── u ─┬─ a ── v ── e        x → y, z        a pair, say
       │          └─ b                  x y u → a, b    a pair
       └─ z                             x y u a v → e   a demonstration

Each node is computed once: 8 nodes, where separate sequences have 18. A token attends to the tokens of its own node up
to itself, and to the nodes above.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count

SHARED_MIN_TOKENS = 32
"""Two sequences share a part of a node only if it has this many tokens: with fewer, such as the header of a first turn,
the additional node costs more in attention than the shared tokens save. Whole nodes are always shared."""


@dataclass(slots=True, eq=False, repr=False)
class Node:
    """Consecutive tokens that the same sequences have.

    Attributes:
        ids: the tokens.
        parent: the node before it; None for the root, which has no tokens.
        position: the place of the first token in its sequences.
        trained: whether the loss trains one of its sequences.
        children: the nodes after it.
        number: its place in preorder (each node before the nodes below it, these without a gap).
        last: the number of the last node below it, its own if there is none.
        size: tokens of this node and of the nodes below it with the same value of ``trained``.
        unseen: pairs of a query and a key among these tokens that a mask over all pairs would throw away, other than
            those of a key after its query in one sequence.
        sequences: the number of trained sequences that it is in.
        place: the place of its first token among the states of all packs.
    """

    ids: tuple[int, ...]
    parent: Node | None = None
    position: int = 0
    trained: bool = True
    children: list[Node] = field(default_factory=list)
    number: int = -1
    last: int = -1
    size: int = 0
    unseen: int = 0
    sequences: int = 0
    place: int = 0

    def path(self) -> list[Node]:
        """The nodes of the sequence that ends here, the first one first."""
        nodes, node = [self], self
        while node.parent is not None:
            node = node.parent
            nodes.append(node)
        return nodes[::-1]

    def own_children(self) -> list[Node]:
        """The children with the same value of ``trained`` as this node."""
        return [child for child in self.children if child.trained == self.trained]

    def _divide(self, length: int) -> Node:
        """Move the first ``length`` tokens to a new node above this one, and return it."""
        # This node stays the end of the sequences that end here.
        upper = Node(self.ids[:length], self.parent, self.position, self.trained, [self])
        if self.parent is not None:
            siblings = self.parent.children
            siblings[siblings.index(self)] = upper
        self.ids, self.position, self.parent = self.ids[length:], self.position + length, upper
        return upper


class PrefixTree:
    """The prefix tree of sequences, to which they are added one by one.

    Args:
        share: share what sequences have in common; if not, each has nodes of its own.

    Attributes:
        root: the node above all sequences, without tokens.
        tokens: the number of tokens in all nodes.
    """

    def __init__(self, *, share: bool = True) -> None:
        self.root, self.share, self.tokens = Node(()), share, 0
        self._prompts: dict[tuple[int, ...], Node] = {}

    def add(self, prompt: tuple[int, ...], completion: tuple[int, ...], *, trained: bool = True) -> Node:
        """Add a sequence. Sequences that the loss trains have to be added before the others.

        Returns:
            The node at its end. There is a node at the end of its prompt, too.
        """
        node = self._prompts.get(prompt) if self.share else None
        if node is None:
            node = self._prompts[prompt] = self._below(self.root, prompt, trained)
        return self._below(node, completion, trained)

    def nodes(self) -> list[Node]:
        """Number and measure the nodes, and return all but the root, in preorder."""
        nodes: list[Node] = []
        # Not recursion: a long conversation with a judgement on each turn may be deeper than Python's stack.
        waiting = [self.root]
        while waiting:
            node = waiting.pop()
            node.number = node.last = len(nodes) - 1
            nodes.append(node)
            waiting += reversed(node.children)
        for node in reversed(nodes[1:]):
            assert node.parent is not None
            node.parent.last = max(node.parent.last, node.last)
            below = node.own_children()
            tokens, unseen = sum(child.size for child in below), unseen_pairs(below)
            # A path without branches is causal, as one long node would be.
            node.size, node.unseen = len(node.ids) + tokens, unseen + (len(node.ids) * tokens if unseen else 0)
        return nodes[1:]

    def _below(self, node: Node, ids: tuple[int, ...], trained: bool) -> Node:
        """The node at the end of these tokens after ``node``; missing nodes are added."""
        while ids:
            child, length = None, 0
            for candidate in node.children if self.share else ():
                if (common := _common_length(candidate.ids, ids)) > length:
                    child, length = candidate, common
            if child is None:
                child, length = Node(ids, node, node.position + len(node.ids), trained), len(ids)
                node.children.append(child)
                self.tokens += length
            node, ids = child if length == len(child.ids) else child._divide(length), ids[length:]
        return node


def _common_length(ids: tuple[int, ...], others: tuple[int, ...]) -> int:
    """The number of common first tokens that become a shared node: all of either, or at least
    :data:`SHARED_MIN_TOKENS`; else 0."""
    shorter = min(len(ids), len(others))
    # Slices are compared first, because nearly all nodes differ early or not at all.
    if ids[:shorter] == others[:shorter]:
        return shorter
    if shorter < SHARED_MIN_TOKENS or ids[:SHARED_MIN_TOKENS] != others[:SHARED_MIN_TOKENS]:
        return 0
    return next(n for n in count(SHARED_MIN_TOKENS) if ids[n] != others[n])


def unseen_pairs(siblings: Sequence[Node]) -> int:
    """Pairs of tokens in the subtrees of siblings that do not attend to each other; see :attr:`Node.unseen`."""
    sizes = [node.size for node in siblings]
    return sum(sizes) ** 2 - sum(size**2 for size in sizes) + sum(node.unseen for node in siblings)


def trained_above(nodes: Sequence[Node]) -> Iterator[Node]:
    """The trained nodes above those that are not trained, in preorder."""
    above: set[int] = set()
    for node in nodes:
        parent = node.parent
        while not node.trained and parent is not None and parent.number not in above:
            above.add(parent.number)
            parent = parent.parent
    return (node for node in nodes if node.trained and node.number in above)
