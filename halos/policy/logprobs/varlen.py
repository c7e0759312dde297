"""On CUDA, attention over a whole pack in one call of PyTorch's variable-length attention, which is FlashAttention.

The function takes several sequences of queries, each with its own keys. Here each node of a pack's prefix tree is such
a sequence. Its keys are those of the nodes above it, followed by its own:

    pack        x1 x2 x3 | a1 a2          | b1 b2             a prompt with two completions
    queries     x1 x2 x3 | a1 a2          | b1 b2
    keys        x1 x2 x3 | x1 x2 x3 a1 a2 | x1 x2 x3 b1 b2

If a sequence has fewer queries than keys, FlashAttention aligns its causal mask with the last keys, so b1 sees the
prompt and itself. This is exact for trees of any depth and with sliding windows, because the positions of a node follow
those of its parent. It costs a copy of a prompt's keys and values for each completion.

The function needs no compiler, unlike FlexAttention. It has no float32, no dropout and no cap of scores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import accumulate
from typing import NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from halos.data.batches.packing import Pack
from halos.policy.logprobs.flex import ScoreOptions
from halos.policy.logprobs.precision import product_dtype
from halos.transfer import on_device


class Sequences(NamedTuple):
    """The S sequences of a pack with N queries.

    Attributes:
        query_edges: the beginnings of the sequences among the queries, and the end of the last one [S + 1].
        key_edges: the same among the keys of all sequences, end to end [S + 1].
        places: for each of these keys, its index among the keys of the pack.
        max_queries: the number of queries of the longest sequence.
        max_keys: the largest number of keys of a sequence.
    """

    query_edges: Tensor
    key_edges: Tensor
    places: Tensor
    max_queries: int
    max_keys: int


def varlen_attend(query: Tensor, key: Tensor, value: Tensor, sequences: Sequences, options: ScoreOptions) -> Tensor:
    """Compute attention of all queries of a pack.

    Args:
        query: [1, heads, N, width].
        key: [1, key heads, P + N, width], where the query heads are a multiple of the key heads.
        value: as ``key``.
        sequences: the result of :func:`sequences_of`.
        options: how scores become weights; without dropout.

    Returns:
        [1, heads, N, width].

    Raises:
        ValueError: if scores are to be capped.
    """
    if options.softcap is not None:
        raise ValueError("expected scores without a cap, which variable-length attention does not have")
    dtype = product_dtype(query)
    query, key, value = (states.to(dtype)[0].transpose(0, 1) for states in (query, key, value))
    key, value = (states.index_select(0, sequences.places) for states in (key, value))
    edges = (sequences.query_edges, sequences.key_edges, sequences.max_queries, sequences.max_keys)
    # A window of transformers includes the key at the query's own position, and FlashAttention's does not.
    window = (-1 if options.window is None else options.window - 1, 0)
    grouped = query.shape[1] != key.shape[1]
    output = _varlen_function()(
        query, key, value, *edges, scale=options.scaling, window_size=window, enable_gqa=grouped
    )
    return output.transpose(0, 1)[None]


def _varlen_function() -> Callable[..., Tensor]:
    # Before PyTorch 2.12 the function lacks some of the arguments that are passed here, so it fails in the trial.
    from torch.nn.attention.varlen import varlen_attn

    # It returns a tuple only if it is asked for the log-sums.
    return cast("Callable[..., Tensor]", varlen_attn)


def sequences_of(pack: Pack) -> Sequences:
    """Return the sequences of a pack, one for each of its own nodes, on the pack's device."""
    # Computed from the sizes of nodes, which are Python numbers, so that the host does not wait for the device.
    starts = [0, *accumulate(node.tokens for node in pack.nodes)]
    ranges = [np.arange(starts[index], starts[index + 1]) for index in range(len(pack.nodes))]
    paths = list(_paths(pack, earlier=starts[-1] - len(pack.input_ids)))
    queries = [pack.nodes[path[-1]].tokens for path in paths]
    keys = [sum(pack.nodes[index].tokens for index in path) for path in paths]
    key_places = [ranges[index] for path in paths for index in path]
    # In one table, which needs only one copy to the device.
    table = np.concatenate([[0], np.cumsum(queries), [0], np.cumsum(keys), *key_places]).astype(np.int32)
    lengths = [len(paths) + 1, len(paths) + 1, sum(keys)]
    query_edges, key_edges, places = torch.split(on_device(table, device=pack.node.device), lengths)
    return Sequences(query_edges, key_edges, places, max(queries), max(keys))


def _paths(pack: Pack, earlier: int) -> Iterator[list[int]]:
    """For each of the pack's own nodes, the indices of the nodes from the root to it.

    The first ``earlier`` keys are those of the pack before it.
    """
    start = 0
    for node in pack.nodes:
        if start >= earlier:
            path = [n for n, above in enumerate(pack.nodes) if above.number <= node.number <= above.last]
            yield sorted(path, key=lambda n: pack.nodes[n].number)
        start += node.tokens
