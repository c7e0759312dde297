"""Attention over a whole pack in one call: FlexAttention, which computes only those blocks of scores that something
sees.

For CUDA, where it is compiled for the shapes that come up. On CPUs PyTorch has its forward pass only, and runs that
uncompiled.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from halos.data.batches.packing import PROMPT, Pack

BLOCK = 128
"""Queries, and keys, of a block; the smallest that PyTorch's kernels take by default."""

VERSIONS = 64
"""Versions of the compiled function that are kept: with and without gradient, earlier keys, several blocks, for each
window of the model."""


def flex_attend(
    query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, *, scaling: float | None, softcap: float | None
) -> Tensor:
    """Attention of queries [1, heads, N, width] → the same shape; keys [1, ·, P + N, width] may have fewer heads."""
    kind = query.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else query.dtype
    attended: Tensor = _function(kind)(
        query.to(dtype),
        key.to(dtype),
        value.to(dtype),
        score_mod=None if softcap is None else _capped(softcap),
        block_mask=mask,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return attended


@cache
def _function(kind: str) -> Any:
    function: Any = flex_attention
    # Beyond the limit it would run uncompiled, all scores of a pack at once.
    return torch.compile(function, **keep_versions(VERSIONS)) if kind == "cuda" else function


def keep_versions(count: int) -> dict[str, Any]:
    """Have dynamo keep so many versions of compiled code, with the options of torch.compile that say so.

    The global limit holds for this thread alone, and on CUDA checkpointed layers run again in another; PyTorch before
    2.13 has no other.
    """
    import torch._dynamo

    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, count)
    known = "recompile_limit" in inspect.signature(torch.compile).parameters
    return {"recompile_limit": count} if known else {}


@cache
def _capped(cap: float) -> Callable[..., Tensor]:
    def score_mod(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return cap * torch.tanh(score / cap)

    return score_mod


def block_mask(pack: Pack, window: int | None) -> BlockMask:
    """Which keys [P + N] each query [N] of the pack sees, and which blocks of them need to be looked at."""
    tree, branch, position = pack.tree, pack.branch, pack.position
    before = len(tree) - len(pack.input_ids)
    # Tensors all: a number that changes from pack to pack would be compiled into the kernel.
    own_tree, own_branch, own_position = (keys[before:].contiguous() for keys in (tree, branch, position))

    def seen(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        distance = own_position[query] - position[key]
        found = (own_tree[query] == tree[key]) & (distance >= 0)
        found = found & ((branch[key] == PROMPT) | (own_branch[query] == branch[key]))
        return found if window is None else found & (distance < window)

    blocks = _blocks(pack, before)
    # Listed first in each row, as the kernel reads only so many of them.
    order = blocks.int().argsort(dim=1, descending=True, stable=True).int()
    return BlockMask.from_kv_blocks(
        blocks.sum(1, dtype=torch.int32)[None, None].to(tree.device),
        order[None, None].to(tree.device),
        BLOCK_SIZE=BLOCK,
        mask_mod=seen,
        seq_lengths=(len(pack.input_ids), len(tree)),
    )


def _blocks(pack: Pack, before: int) -> Tensor:
    # [blocks of queries, blocks of keys], from what the host knows of the pack: nothing waits for the device.
    edges = [0, *accumulate(pack.sizes)]
    queries, keys = (-(-count // BLOCK) for count in (edges[-1] - before, edges[-1]))
    blocks = torch.zeros(queries, keys, dtype=torch.bool)
    for own, pieces in enumerate(pack.attends, len(pack.sizes) - len(pack.attends)):
        rows = _covering(edges[own] - before, edges[own + 1] - before)
        for piece in pieces:
            blocks[rows, _covering(edges[piece], edges[piece + 1])] = True
    # No key comes behind its query.
    last = before + BLOCK * torch.arange(1, queries + 1) - 1
    return blocks & (BLOCK * torch.arange(keys) <= last[:, None])


def _covering(start: int, stop: int) -> slice:
    return slice(start // BLOCK, -(-stop // BLOCK))
