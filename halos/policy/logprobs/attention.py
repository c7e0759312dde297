"""Attention over packed rows, through the attention interface of transformers: no model code is copied.

A pack lays the nodes of a prefix tree end to end (:mod:`halos.data.batches.packing`). A prompt x1 x2 x3 with the
completions a1 a2 a3 and b1 b2, and the later prompt x1 x2 x3 b1 b2 u1 with the completion c1:

    tokens      x1  x2  x3 | a1  a2 | b1 | b2  u1
    position     0   1   2    3   4    3    4   5     positions are those of each token's own sequence
    x1           ■
    x2           ■   ■
    x3           ■   ■   ■                            predicts a1 and b1
    a1           ■   ■   ■    ■                       predicts a2
    a2           ■   ■   ■    ■   ■                   predicts a3
    b1           ■   ■   ■             ■              predicts b2: sees no token of the other completion
    b2           ■   ■   ■             ■    ■
    u1           ■   ■   ■             ■    ■   ■     predicts c1

Tokens of different trees never see each other, so most scores of a pack are masked out, and computing them would be a
waste. So a pack is cut into pieces (short trees together, long trees node by node), and attention is called once for
each piece, with the keys of the pieces that it sees. On CUDA one call can do all pieces
(:mod:`halos.policy.logprobs.attention_choice`).

The model's attention implementation is replaced only during a packed forward. Everything else uses the implementation
that the model was loaded with: generation, separate rows, the exported config.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask

from halos.data.batches.packing import Pack
from halos.policy.checkpointing import recomputed_within
from halos.policy.kernels.device_types import device_type
from halos.policy.logprobs.attention_choice import AUTO, FLEX, PIECES, VARLEN, Heads, chosen_attention
from halos.policy.logprobs.flex import ScoreOptions, block_mask, flex_attend
from halos.policy.logprobs.precision import product_dtype
from halos.policy.logprobs.varlen import Sequences, sequences_of, varlen_attend

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

IMPLEMENTATION_NAME = "halos_packed"
KeysValues = dict[nn.Module, tuple[Tensor, Tensor]]
"""The keys and values of each attention module, [1, heads, tokens, width]."""


class PackedAttention:
    """Attention within one pack: a token sees the nodes above its own, and the tokens before it in its own node.

    Args:
        pack: the pack, which says where its pieces and nodes are.
        earlier: for each attention module the keys and values [1, heads, P, width] of the earlier nodes that the pack
            continues.
        keep: whether to collect the keys and values that the next pack continues.
        kernel: ``pieces``, ``flex``, ``varlen``, or ``auto``
            (:mod:`halos.policy.logprobs.attention_choice`). With dropout it is ``pieces`` in any case.

    Attributes:
        kept: the collected keys and values of each attention module, detached.
        windows: the sliding windows that the model passed.
    """

    def __init__(
        self, pack: Pack, *, earlier: KeysValues | None = None, keep: bool = False, kernel: str = PIECES
    ) -> None:
        self.pack, self.earlier, self.keep, self.kernel = pack, earlier, keep, kernel
        self.kept: KeysValues = {}
        self.windows: set[int | None] = set()
        # By window, as all layers with the same window share the masks.
        self._masks: dict[int | None, list[Tensor | None]] = {}
        self._block_masks: dict[int | None, BlockMask] = {}
        self._sequences: Sequences | None = None

    def __call__(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, options: ScoreOptions) -> Tensor:
        """Attention of queries [1, heads, N, width] → [1, N, heads, width]."""
        if self.keep:
            places = self.pack.kept
            self.kept[module] = (key.detach()[:, :, places], value.detach()[:, :, places])
        if self.earlier is not None:
            earlier_key, earlier_value = self.earlier[module]
            key, value = torch.cat([earlier_key, key], 2), torch.cat([earlier_value, value], 2)
        window = options.window
        self.windows.add(window)
        kernel = self._kernel_for(query, key, options)
        if kernel == FLEX:
            if window not in self._block_masks:
                self._block_masks[window] = block_mask(self.pack, window)
            return flex_attend(query, key, value, self._block_masks[window], options).transpose(1, 2)
        if kernel == VARLEN:
            self._sequences = self._sequences or sequences_of(self.pack)
            return varlen_attend(query, key, value, self._sequences, options).transpose(1, 2)
        # split(), not slices: the backward pass of each slice would write a gradient as large as the whole tensor.
        sizes = list(self.pack.sizes)
        queries = torch.split(query, sizes[-len(self.pack.attends) :], 2)
        keys, values = torch.split(key, sizes, 2), torch.split(value, sizes, 2)
        outputs = []
        if window not in self._masks:
            self._masks[window] = list(self._make_masks(window))
        for q, pieces, piece_mask in zip(queries, self.pack.attends, self._masks[window], strict=True):
            k, v = _joined([keys[piece] for piece in pieces], 2), _joined([values[piece] for piece in pieces], 2)
            outputs.append(attend(q, k, v, piece_mask, options).transpose(1, 2))
        return torch.cat(outputs, 1)

    def _kernel_for(self, query: Tensor, key: Tensor, options: ScoreOptions) -> str:
        if options.dropout or (self.kernel == AUTO and not query.is_cuda):
            return PIECES
        if self.kernel != AUTO:
            return self.kernel
        sizes = query.shape[1], key.shape[1], query.shape[-1]
        return chosen_attention(Heads(query.device, product_dtype(query), *sizes, options))

    def _make_masks(self, window: int | None) -> Iterator[Tensor | None]:
        """For each piece of queries, a mask of the keys that it sees, [queries, keys]; None: causal attention."""
        pack, sizes = self.pack, list(self.pack.sizes)
        node, last, position = (torch.split(keys, sizes) for keys in (pack.node, pack.last, pack.position))
        for own, pieces in enumerate(pack.attends, len(sizes) - len(pack.attends)):
            # A piece that is one sequence needs no mask in memory, because kernels have causal attention built in.
            if own in pack.plain and (window is None or sizes[own] <= window):
                yield None
                continue
            key_node, key_last, key_position = (
                _joined([keys[piece] for piece in pieces], 0) for keys in (node, last, position)
            )
            distance = position[own][:, None] - key_position
            # The query's node is the key's or one below it.
            seen = (key_node <= node[own][:, None]) & (node[own][:, None] <= key_last) & (distance >= 0)
            yield seen if window is None else seen & (distance < window)


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: ScoreOptions) -> Tensor:
    """Attention of one piece.

    Args:
        query: [1, heads, queries, width].
        key: [1, key heads, keys, width], where the query heads are a multiple of the key heads.
        value: as ``key``.
        mask: true where a query sees a key [queries, keys]; None: causal.
        options: how scores become weights. The window is part of the mask.

    Returns:
        [1, heads, queries, width].
    """
    if options.softcap is not None:
        return _soft_capped(query, key, value, mask, options, options.softcap)
    device = device_type(query)
    dtype = product_dtype(query)
    if device == "cpu" and dtype == torch.bfloat16:
        # PyTorch's backward pass takes twice as long in bfloat16 on CPUs as in float32.
        with torch.autocast("cpu", enabled=False):
            output = attend(query.float(), key.float(), value.float(), mask, options)
        return output.to(dtype)
    groups = query.shape[1] // key.shape[1]
    if groups > 1 and repeats_heads(device, dtype, masked=mask is not None):
        key, value = (states.repeat_interleave(groups, 1) for states in (key, value))
    grouped, causal = query.shape[1] != key.shape[1], mask is None
    return F.scaled_dot_product_attention(
        query, key, value, mask, options.dropout, causal, scale=options.scaling, enable_gqa=grouped
    )


def repeats_heads(device: str, dtype: torch.dtype, *, masked: bool) -> bool:
    """Return whether keys and values of grouped heads have to be repeated for each query head."""
    # On CUDA only one fused kernel, FlashAttention, supports groups, and it takes neither masks nor float32. Without a
    # fused kernel all scores would be kept for the backward pass; repeated keys and values take less memory.
    return device == "cuda" and (masked or dtype not in (torch.bfloat16, torch.float16))


def _soft_capped(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: ScoreOptions, softcap: float
) -> Tensor:
    # Written out, as no fused kernel of PyTorch caps scores.
    groups = query.shape[1] // key.shape[1]
    key, value = (states.repeat_interleave(groups, 1) for states in (key, value))
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if options.scaling is None else options.scaling)
    scores = softcap * torch.tanh(scores / softcap)
    if mask is None:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    weights = scores.masked_fill(~mask, -torch.inf)
    weights = weights.softmax(-1, torch.promote_types(scores.dtype, torch.float32)).to(query.dtype)
    return F.dropout(weights, options.dropout) @ value


def _joined(pieces: Sequence[Tensor], dim: int) -> Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(list(pieces), dim)


def _packed_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: object = None, **settings: Any
) -> tuple[Tensor, None]:
    for name in ("s_aux", "position_bias"):  # terms inside the softmax that this function does not compute
        if settings.get(name) is not None:
            raise NotImplementedError(f"attention with {name}")
    # Architectures pass only what they have.
    scaling, dropout = settings.get("scaling"), settings.get("dropout", 0.0)
    options = ScoreOptions(scaling, dropout, settings.get("sliding_window"), settings.get("softcap"))
    packed: PackedAttention = settings["packed"]
    return packed(module, query, key, value, options), None


def leave_uncompiled() -> None:
    """Keep torch.compile out of packed attention, wherever a compiled layer calls it."""
    global _packed_attention
    disable: Callable[..., Callable[..., tuple[Tensor, None]]] = torch.compiler.disable
    _packed_attention = disable(_packed_attention)


# For the time of a forward


@contextmanager
def packed_attention(model: nn.Module) -> Iterator[None]:
    """Within this context, the model's attention modules call the :class:`PackedAttention` passed as ``packed``."""
    from transformers import AttentionInterface

    # No mask function is registered for the name, so the model makes no masks of its own.
    AttentionInterface.register(IMPLEMENTATION_NAME, _packed_attention)
    # A checkpointed layer runs again in the backward pass, when this context is over, and has to find the same
    # implementation then.
    with _implementation(model), recomputed_within(model, partial(_implementation, model)):
        yield


@contextmanager
def _implementation(model: nn.Module) -> Iterator[None]:
    # Modules share configs, and a model can have several (text, vision): each is changed once.
    configs: dict[int, PreTrainedConfig] = {
        id(module.config): module.config  # type: ignore[misc]
        for module in model.modules()
        if hasattr(getattr(module, "config", None), "_attn_implementation")
    }
    before = {key: config._attn_implementation for key, config in configs.items()}
    try:
        for config in configs.values():
            config._attn_implementation = IMPLEMENTATION_NAME
        yield
    finally:
        for key, implementation in before.items():
            configs[key]._attn_implementation = implementation
