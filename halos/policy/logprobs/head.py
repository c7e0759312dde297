"""The LM head, applied only to the states that predict a scored token, a chunk of them at a time."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from halos.policy.adapters import head_delta, plain_head
from halos.policy.kernels.matmul import add_product, affine
from halos.policy.logprobs.token_statistics import measure

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LogitShape:
    """What a model does to its head's logits: z → ``scale`` · z, then z → ``cap`` · tanh(z / ``cap``) if capped."""

    scale: float = 1.0
    cap: float | None = None

    def __call__(self, logits: Tensor) -> Tensor:
        logits = logits if self.scale == 1 else logits * self.scale
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)

    def slope(self, logits: Tensor) -> Tensor | float:
        """The derivative, at logits that the shape has already been given to."""
        return self.scale if self.cap is None else self.scale * (1 - (logits / self.cap) ** 2)


@dataclass(slots=True)
class Scored:
    """``logprobs`` [M] of the targets, ``statistics`` [M, names] where they were predicted (without gradient), the
    ``states`` [M, H] that predict them, and ``all_states`` [..., H]."""

    logprobs: Tensor
    statistics: Tensor
    states: Tensor
    all_states: Tensor


def forward_scored(
    model: Any,
    forward: Callable[[], Any],
    targets: Tensor,
    choose: Callable[[Tensor], Tensor],
    *,
    head_chunk: int | None = None,
    statistics: Sequence[str] = (),
) -> Scored:
    """One ``forward`` of the model, its head applied only to the M states that ``choose`` picks from the last layer's.

    With ``head_chunk`` no more than so many rows of logits exist at a time, in the backward pass too; heads that are
    no plain linear layer, with or without LoRA (a sharded one), or whose logits are changed in an unknown way get all
    rows at once. ``statistics``: names in :data:`halos.policy.logprobs.token_statistics.STATISTICS`.
    """
    head = model.get_output_embeddings()
    shape = logit_shape(model) if head_chunk else None
    with _head_sees(head, choose, idle=shape is not None) as kept:
        logits = forward().logits[0]
    if head_chunk and shape is not None:
        delta = head_delta(head, kept[1])
        options: dict[str, Any] = {"rows": head_chunk, "shape": shape, "delta": delta, "statistics": statistics}
        logprobs, measured = chunked_logprobs(kept[1], head.weight, head.bias, targets, **options)
    else:
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        logprobs = -F.cross_entropy(logits, targets, reduction="none")
        given = logits.detach()
        measured = measure(statistics, given, given.logsumexp(1) if statistics else given, targets)
    return Scored(logprobs, measured, kept[1], kept[0])


@contextmanager
def _head_sees(head: Any, choose: Callable[[Tensor], Tensor], *, idle: bool) -> Iterator[list[Tensor]]:
    """Within, the LM head gets the chosen states [1, M, H], or does nothing; the list receives all and the chosen.

    A hook rather than a call of our own: what a model does around its head stays its own business.
    """
    kept: list[Tensor] = []

    def select(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        kept.extend((args[0], choose(args[0])))
        return (kept[1].unsqueeze(0), *args[1:])

    handle = head.register_forward_pre_hook(select)
    own = head.__dict__.get("forward")
    if idle:
        head.forward = lambda states: states.new_empty(1, 0, head.weight.shape[0])
    try:
        yield kept
    finally:
        handle.remove()
        if idle:
            del head.forward
            if own is not None:
                head.forward = own


def chunked_logprobs(
    states: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    *,
    rows: int,
    shape: LogitShape = LogitShape(),
    delta: tuple[Tensor, Tensor] | None = None,
    statistics: Sequence[str] = (),
) -> tuple[Tensor, Tensor]:
    """log softmax(shape(states · weightᵀ + bias + low · upᵀ)) at the targets [M], in float32 (or float64), and
    the named ``statistics`` [M, names] of the same logits, without gradient.

    ``delta``: the factors ``low`` [M, r] and ``up`` [V, r] of what LoRA adds, if it adds anything.

    Logits are computed in the precision of the model (that of autocast, if it is on), ``rows`` rows at a time, and,
    except for the first rows, once more in the backward pass.
    """
    device = states.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else states.dtype
    low, up = delta or (None, None)
    found: tuple[Tensor, Tensor] = _ChunkedLogProbs.apply(
        *(states, weight, bias, low, up, targets), rows, shape, dtype, tuple(statistics)
    )
    return found


BLOCK = 16
"""Rows of logits in float32 that exist at a time on a CPU: few enough to stay in its cache."""


class _ChunkedLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        low: Tensor | None,
        up: Tensor | None,
        targets: Tensor,
        rows: int,
        shape: LogitShape,
        dtype: torch.dtype,
        statistics: tuple[str, ...],
    ) -> tuple[Tensor, Tensor]:
        cast = _cast(states, weight, bias, dtype)
        wide = torch.promote_types(dtype, torch.float32)
        picked = states.new_empty(len(states), dtype=wide)
        normaliser = torch.empty_like(picked)
        measured = picked.new_empty(len(states), len(statistics))
        kept = memory = _memory(cast[0], weight, rows)
        for part in reversed([*_parts(len(states), rows)]):
            del kept  # or two chunks would exist at a time where products have memory of their own (oneDNN)
            kept = affine(cast[0][part], *cast[1:], out=memory)
            for block, raw in _blocks(part, kept):
                logits = shape(_with_delta(raw.to(wide), low, up, block))
                picked[block] = logits.gather(1, targets[block, None])[:, 0]
                normaliser[block] = logits.logsumexp(1)
                if statistics:
                    measured[block] = measure(statistics, logits, normaliser[block], targets[block])
        # The backward pass begins with the chunk that is there; it needs the memory in any case.
        ctx.save_for_backward(*cast, low, up, targets, normaliser, kept)
        ctx.used = False
        ctx.rows, ctx.shape, ctx.dtypes = rows, shape, [None if t is None else t.dtype for t in (states, weight, bias)]
        ctx.mark_non_differentiable(measured)
        return picked - normaliser, measured

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> Any:
        states, weight, bias, low, up, targets, normaliser, kept = ctx.saved_tensors
        wide = normaliser.dtype
        of_states, of_weight, of_bias, of_low, of_up = (
            torch.zeros_like(value, dtype=wide) if value is not None and needed else None
            for value, needed in zip((states, weight, bias, low, up), ctx.needs_input_grad, strict=False)
        )
        # Changes of it are ours: a second backward pass, for which it is used up, may follow.
        changes = memory = kept.data
        for part in _parts(len(states), ctx.rows):
            # First the logits, then, block by block, their gradient.
            if part.start or ctx.used:
                del changes
                changes = affine(states[part], weight, bias, out=memory)
            for block, raw in _blocks(part, changes):
                logits = ctx.shape(_with_delta(raw.to(wide, copy=True), low, up, block))
                slope = ctx.shape.slope(logits)
                # d log p(target) / dz = 1[target] − softmax(z)
                change = logits.sub_(normaliser[block, None]).exp_().mul_(-gradient[block, None])
                change.scatter_add_(1, targets[block, None], gradient[block, None])
                change = change if ctx.shape == LogitShape() else change.mul_(slope)
                if of_low is not None:
                    of_low[block] = (change.to(up.dtype) @ up).to(wide)
                if of_up is not None:
                    of_up += change.to(low.dtype).T @ low[block]
                if of_bias is not None:
                    of_bias += change.sum(0)
                raw.copy_(change)
            if of_states is not None:
                of_states[part] = affine(changes, weight.T).to(wide)
            if of_weight is not None:  # chunks are added up in float32, whatever the precision of their products
                add_product(of_weight, changes.T, states[part])
        ctx.used = True
        dtypes = (*ctx.dtypes, None if low is None else low.dtype, None if up is None else up.dtype)
        found = zip((of_states, of_weight, of_bias, of_low, of_up), dtypes, strict=True)
        return *(None if one is None else one.to(dtype) for one, dtype in found), *5 * [None]


def _cast(
    states: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor | None]:
    return states.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


def _memory(states: Tensor, weight: Tensor, rows: int) -> Tensor:
    """Room for a chunk of logits, which all chunks use: on a CPU new memory costs a fifth of the product's time.

    Where their length could be a multiple of a page, which caches handle badly, its rows lie a few numbers further
    apart. Other lengths get no such gap: oneDNN's bfloat16 products on AMX read past the end of rows whose length is
    no multiple of 32 (uxlfoundation/oneDNN#5603), and a NaN left there would reach the gradient.
    """
    length = weight.shape[0]
    gap = 0 if length % 32 else 16
    return states.new_empty(min(rows, len(states)), length + gap)[:, :length]


def _with_delta(logits: Tensor, low: Tensor | None, up: Tensor | None, block: slice) -> Tensor:
    return logits if low is None or up is None else logits + F.linear(low[block], up).to(logits)


def _parts(length: int, rows: int) -> Iterator[slice]:
    return (slice(start, min(start + rows, length)) for start in range(0, length, rows))


def _blocks(part: slice, logits: Tensor) -> Iterator[tuple[slice, Tensor]]:
    # Views of a chunk's logits, with their places among all.
    for block in _parts(len(logits), BLOCK if logits.device.type == "cpu" else len(logits)):
        yield slice(part.start + block.start, part.start + block.stop), logits[block]


_shapes: WeakKeyDictionary[nn.Module, LogitShape | None] = WeakKeyDictionary()


def logit_shape(model: Any) -> LogitShape | None:
    """What the model does to its head's logits, or None if its head cannot be computed in chunks.

    Read from the config and checked once against the model's own logits.
    """
    if model not in _shapes:
        _shapes[model] = _find_shape(model)
        if _shapes[model] is None:
            log.info("%s: the LM head is not computed in chunks (model.head_chunk)", type(model).__name__)
    return _shapes[model]


@torch.no_grad()
def _find_shape(model: Any) -> LogitShape | None:
    head = model.get_output_embeddings()
    if not plain_head(head):
        return None
    config = model.config.get_text_config()
    scale = getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1)
    shape = LogitShape(float(scale), getattr(config, "final_logit_softcapping", None))
    kept: list[Tensor] = []
    handle = head.register_forward_hook(lambda _, __, output: kept.append(output))
    try:
        with evaluating(model), torch.autocast(head.weight.device.type, enabled=False):
            ids = torch.arange(4, device=head.weight.device)[None]
            logits = model(input_ids=ids, use_cache=False).logits
    finally:
        handle.remove()
    raw, logits = kept[0].double(), logits.double()
    within = float(torch.finfo(head.weight.dtype).eps) ** 0.5 * float(raw.std())
    return shape if torch.allclose(shape(raw), logits, rtol=0, atol=max(within, 1e-12)) else None


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within, the model is in evaluation mode: trying it out draws no random numbers."""
    training = [module for module in model.modules() if module.training]
    try:
        model.eval()
        yield
    finally:
        for module in training:
            module.training = True
