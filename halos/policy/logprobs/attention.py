"""Attention over packed rows, through the attention interface of transformers: no model code is copied.

For the time of one forward the model's attention implementation is ours. Each piece of a pack is a call of its own, so
nothing is computed between rows that do not see each other; or FlexAttention does all of them in one call
(:func:`attend_by_flex`). The implementation that the model was loaded with serves everything else: generation, separate
rows, the exported config.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any
from weakref import WeakSet

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask

from halos.data.batches.packing import PROMPT, Pack
from halos.policy.logprobs.flex import block_mask, flex_attend

NAME = "halos_packed"
KeysValues = tuple[Tensor, Tensor]


class PackedAttention:
    """Attention within one pack: a token sees its prompt, and the tokens of its own branch before it.

    Args:
        pack: what the tokens are.
        earlier: for each attention module the keys and values [1, heads, P, width] of the prompts that the pack
            continues.
        keep: whether to collect those of this pack's prompts, detached, in ``kept``.
        flex: whether to attend by one call of FlexAttention, which knows no dropout.
    """

    def __init__(
        self,
        pack: Pack,
        *,
        earlier: dict[nn.Module, KeysValues] | None = None,
        keep: bool = False,
        flex: bool = False,
    ) -> None:
        self.pack, self.earlier, self.keep, self.flex = pack, earlier, keep, flex
        self.kept: dict[nn.Module, KeysValues] = {}
        self.windows: set[int | None] = set()
        """The sliding windows that the model asked for."""
        self._masks: dict[int | None, list[Tensor | None]] = {}
        self._block_masks: dict[int | None, BlockMask] = {}

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scaling: float | None,
        dropout: float,
        window: int | None,
        softcap: float | None,
    ) -> Tensor:
        """Attention of queries [1, heads, N, width] → [1, N, heads, width]."""
        if self.keep:
            prompts = self.pack.prompts
            self.kept[module] = (key.detach()[:, :, prompts], value.detach()[:, :, prompts])
        if self.earlier is not None:
            key, value = (torch.cat(both, 2) for both in zip(self.earlier[module], (key, value), strict=True))
        self.windows.add(window)
        if self.flex and not dropout:
            if window not in self._block_masks:
                self._block_masks[window] = block_mask(self.pack, window)
            attended = flex_attend(query, key, value, self._block_masks[window], scaling=scaling, softcap=softcap)
            return attended.transpose(1, 2)
        # split, not slices: the gradient of each slice would be as large as the whole.
        queries = query.split(list(self.pack.sizes[-len(self.pack.attends) :]), 2)
        keys, values = (states.split(list(self.pack.sizes), 2) for states in (key, value))
        parts = []
        for q, pieces, mask in zip(queries, self.pack.attends, self._masks_for(window), strict=True):
            k, v = (_joined([states[piece] for piece in pieces]) for states in (keys, values))
            parts.append(attend(q, k, v, mask, scaling=scaling, dropout=dropout, softcap=softcap).transpose(1, 2))
        return torch.cat(parts, 1)

    def _masks_for(self, window: int | None) -> list[Tensor | None]:
        if window not in self._masks:
            self._masks[window] = list(self._make_masks(window))
        return self._masks[window]

    def _make_masks(self, window: int | None) -> Iterator[Tensor | None]:
        # None where the piece is one sequence without branches, which is_causal describes.
        sizes = list(self.pack.sizes)
        tree, branch, position = (part.split(sizes) for part in (self.pack.tree, self.pack.branch, self.pack.position))
        for own, pieces in enumerate(self.pack.attends, len(sizes) - len(self.pack.attends)):
            if own in self.pack.plain and (window is None or sizes[own] <= window):
                yield None
                continue
            k_tree, k_branch, k_position = (_joined([part[n] for n in pieces], 0) for part in (tree, branch, position))
            distance = position[own][:, None] - k_position
            seen = (tree[own][:, None] == k_tree) & (distance >= 0)
            seen &= (k_branch == PROMPT) | (branch[own][:, None] == k_branch)
            yield seen if window is None else seen & (distance < window)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
) -> Tensor:
    """Attention of one piece; a ``mask`` [queries, keys] of None is causal. Keys may have fewer heads than queries."""
    if softcap is not None:
        return _soft_capped(query, key, value, mask, scaling, dropout, softcap)
    kind = query.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else query.dtype
    if kind == "cpu" and dtype == torch.bfloat16:
        # PyTorch's backward pass takes twice as long in bfloat16 on CPUs as in float32.
        with torch.autocast("cpu", enabled=False):
            wide = attend(query.float(), key.float(), value.float(), mask, scaling=scaling, dropout=dropout)
        return wide.to(dtype)
    groups = query.shape[1] // key.shape[1]
    if groups > 1 and repeats_heads(kind, dtype, masked=mask is not None):
        key, value = (states.repeat_interleave(groups, 1) for states in (key, value))
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=mask is None,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )


def repeats_heads(device: str, dtype: torch.dtype, *, masked: bool) -> bool:
    """Whether keys and values of grouped heads are repeated for each query head: on CUDA the one fused kernel that
    knows groups, FlashAttention, has no masks and no float32, and without a fused kernel all scores are kept."""
    return device == "cuda" and (masked or dtype not in (torch.bfloat16, torch.float16))


def _soft_capped(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    dropout: float,
    softcap: float,
) -> Tensor:
    # No fused kernel of PyTorch caps scores.
    groups = query.shape[1] // key.shape[1]
    key, value = (states.repeat_interleave(groups, 1) for states in (key, value))
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = softcap * torch.tanh(scores / softcap)
    if mask is None:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    weights = scores.masked_fill(~mask, -torch.inf)
    weights = weights.softmax(-1, torch.promote_types(scores.dtype, torch.float32)).to(query.dtype)
    return F.dropout(weights, dropout) @ value


def recomputes_alike(model: nn.Module) -> bool:
    """Whether checkpointed layers, if there are any, can be told to run again with the same attention."""
    layers = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
    functions = [
        layer._gradient_checkpointing_func for layer in layers if hasattr(layer, "_gradient_checkpointing_func")
    ]
    return all(getattr(function, "keywords", {}).get("use_reentrant") is False for function in functions)


def _joined(parts: list[Tensor], dim: int = 2) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def _packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any = None,
    *,
    packed: PackedAttention,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    for name in ("s_aux", "position_bias"):  # terms inside the softmax that this function lacks
        if others.get(name) is not None:
            raise NotImplementedError(f"attention with {name}")
    return packed(
        module, query, key, value, scaling=scaling, dropout=dropout, window=sliding_window, softcap=softcap
    ), None


def leave_uncompiled() -> None:
    """Keep torch.compile out of packed attention, wherever a compiled layer calls it."""
    global _packed_attention
    _packed_attention = torch.compiler.disable(_packed_attention)


_by_flex: WeakSet[nn.Module] = WeakSet()


def attend_by_flex(model: nn.Module) -> None:
    """Have the model attend to packed rows by FlexAttention from now on."""
    _by_flex.add(model)


def attends_by_flex(model: nn.Module) -> bool:
    """Whether :func:`attend_by_flex` was called for it."""
    return model in _by_flex


@contextmanager
def packed_attention(model: nn.Module) -> Iterator[None]:
    """Within, attention modules of the model call the :class:`PackedAttention` that its forward gets as ``packed``.

    No mask function is registered for the name, so the model makes no masks. Checkpointed layers, which run again
    during the backward pass, find the same implementation then.
    """
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, _packed_attention)
    with _implementation(model), _recomputed_alike(model):
        yield


@contextmanager
def _implementation(model: nn.Module) -> Iterator[None]:
    configs: dict[int, Any] = {
        id(module.config): module.config for module in model.modules() if hasattr(module, "config")
    }
    before = {
        key: config._attn_implementation for key, config in configs.items() if hasattr(config, "_attn_implementation")
    }
    try:
        for key in before:
            configs[key]._attn_implementation = NAME
        yield
    finally:
        for key, implementation in before.items():
            configs[key]._attn_implementation = implementation


@contextmanager
def _recomputed_alike(model: nn.Module) -> Iterator[None]:
    layers = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
    before = [getattr(layer, "_gradient_checkpointing_func", None) for layer in layers]
    contexts = partial(_contexts, model)
    try:
        for layer, function in zip(layers, before, strict=True):
            if function is not None:
                layer._gradient_checkpointing_func = partial(function, context_fn=contexts)  # type: ignore[assignment]
        yield
    finally:
        for layer, function in zip(layers, before, strict=True):
            if function is not None:
                layer._gradient_checkpointing_func = function


def _contexts(model: nn.Module) -> tuple[Any, Any]:
    return nullcontext(), _implementation(model)
