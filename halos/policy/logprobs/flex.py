"""Attention over a whole pack in one call of FlexAttention, which skips blocks of scores that no token sees.

It is for CUDA, where the function is compiled. On CPUs PyTorch has only the forward pass, uncompiled, which computes
all scores of a pack at once.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from halos.data.batches.packing import Pack
from halos.policy.logprobs.precision import product_dtype
from halos.transfer import on_device

BLOCK_TOKENS = 128
"""Queries, and keys, of a block; the smallest number that PyTorch's kernels take by default."""

MAX_VERSIONS = 64
"""Compiled versions of the function that are kept: with and without gradient, with and without earlier keys, for one
and for several blocks, and for each window of the model."""


class ScoreOptions(NamedTuple):
    """How a layer turns scores into weights, as transformers passes it to attention.

    Attributes:
        scaling: factor of the scores; None: 1 / √width.
        dropout: the probability that a weight is dropped.
        window: tokens that a query sees in a layer with a sliding window; None: all.
        softcap: c, if scores are capped by c · tanh(score / c).
    """

    scaling: float | None = None
    dropout: float = 0.0
    window: int | None = None
    softcap: float | None = None


def flex_attend(query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, options: ScoreOptions) -> Tensor:
    """Attention of all queries of a pack.

    Args:
        query: [1, heads, N, width].
        key: [1, key heads, P + N, width], where the query heads are a multiple of the key heads.
        value: as ``key``.
        mask: the result of :func:`block_mask`.
        options: how scores become weights. The window is part of the mask; the dropout has to be 0.

    Returns:
        [1, heads, N, width].
    """
    # Autocast does not cover FlexAttention: without the cast, float32 queries would meet bfloat16 values.
    dtype = product_dtype(query)
    query, key, value = (states.to(dtype) for states in (query, key, value))
    score_mod = None if options.softcap is None else _capped(options.softcap)
    grouped = query.shape[1] != key.shape[1]
    return _flex_function(query.device.type)(
        query, key, value, score_mod=score_mod, block_mask=mask, scale=options.scaling, enable_gqa=grouped
    )


@cache
def _flex_function(device: str) -> Callable[..., Tensor]:
    function: Callable[..., Tensor] = flex_attention
    # Dynamo stops compiling at its limit of versions. FlexAttention would then run uncompiled and hold all scores of
    # a pack in memory.
    return torch.compile(function, **keep_versions(MAX_VERSIONS)) if device == "cuda" else function


def keep_versions(count: int) -> dict[str, Any]:
    """Let dynamo keep up to ``count`` versions of compiled code.

    Returns:
        Keywords for torch.compile that set the same limit, where this PyTorch has such.
    """
    import torch._dynamo

    # The global limit holds in this thread only, but on CUDA the backward pass, which runs checkpointed layers again,
    # has a thread of its own. Before PyTorch 2.13 torch.compile had no limit of its own to set.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, count)
    supported = "recompile_limit" in inspect.signature(torch.compile).parameters
    return {"recompile_limit": count} if supported else {}


@cache  # a new function object for each call would be compiled again
def _capped(cap: float) -> Callable[..., Tensor]:
    def score_mod(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return cap * torch.tanh(score / cap)

    return score_mod


def block_mask(pack: Pack, window: int | None) -> BlockMask:
    """Build the mask of a pack: which keys [P + N] each query [N] sees, and which blocks have to be computed."""
    node, last, position = pack.node, pack.last, pack.position
    earlier = len(node) - len(pack.input_ids)
    # The function below must use only tensors, not numbers such as ``earlier``: the kernel would be compiled again for
    # each new number, and these change from pack to pack.
    own_node, own_position = (keys[earlier:].contiguous() for keys in (node, position))

    def is_seen(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        distance = own_position[query] - position[key]
        # The query's node is the key's or one below it.
        seen = (node[key] <= own_node[query]) & (own_node[query] <= last[key]) & (distance >= 0)
        return seen if window is None else seen & (distance < window)

    blocks = _blocks(pack, earlier)
    # The kernel reads the first ``blocks.sum(1)`` entries of each row, so the blocks to compute come first.
    order = np.argsort(~blocks, axis=1, kind="stable").astype(np.int32)
    # One table, so that there is one copy to the device.
    table = on_device(np.column_stack([blocks.sum(1, dtype=np.int32), order]), device=node.device)[None, None]
    counts, columns = table[..., 0].contiguous(), table[..., 1:].contiguous()
    lengths = (len(pack.input_ids), len(node))
    return BlockMask.from_kv_blocks(counts, columns, BLOCK_SIZE=BLOCK_TOKENS, mask_mod=is_seen, seq_lengths=lengths)


def _blocks(pack: Pack, earlier: int) -> np.ndarray:
    """Which blocks have to be computed [blocks of queries, blocks of keys]."""
    # From the sizes of the pieces, which are Python numbers, and not from the mask by create_block_mask(): the host
    # would wait for the device, and all scores' mask would be made. In NumPy, as the host's work.
    edges = [0, *accumulate(pack.sizes)]
    queries, keys = (-(-count // BLOCK_TOKENS) for count in (edges[-1] - earlier, edges[-1]))
    blocks = np.zeros((queries, keys), dtype=bool)
    for own, pieces in enumerate(pack.attends, len(pack.sizes) - len(pack.attends)):
        rows = _covering_blocks(edges[own] - earlier, edges[own + 1] - earlier)
        for piece in pieces:
            blocks[rows, _covering_blocks(edges[piece], edges[piece + 1])] = True
    # No query sees a key after itself: blocks that begin after the last query of their row are left out.
    last_query = earlier + BLOCK_TOKENS * np.arange(1, queries + 1) - 1
    return blocks & (BLOCK_TOKENS * np.arange(keys) <= last_query[:, None])


def _covering_blocks(start: int, stop: int) -> slice:
    return slice(start // BLOCK_TOKENS, -(-stop // BLOCK_TOKENS))
