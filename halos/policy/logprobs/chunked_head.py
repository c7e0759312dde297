"""Log-probs of target tokens under the LM head, with only a chunk of the logits in memory at a time.

With a vocabulary of 128,000 tokens the logits of a batch are larger than all of its activations. Here they are computed
for a chunk of rows, reduced to one log-prob per row, and overwritten by the next chunk. The backward pass computes them
again, chunk by chunk, and overwrites each chunk with its own gradient:

    forward    chunk n-1 → … → chunk 1 → chunk 0       all in one buffer, in which chunk 0's logits stay
    backward                             chunk 0 → chunk 1 → … → chunk n-1     chunk 0 needs no product
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from halos.policy.kernels.device_types import device_type
from halos.policy.kernels.matmul import add_product, affine
from halos.policy.logprobs.precision import product_dtype
from halos.policy.logprobs.token_statistics import measure

CPU_BLOCK_ROWS = 16
"""Rows of a chunk that are converted to float32 at a time on a CPU: few enough to stay in its cache."""
BLOCK_BYTES = 2**25
"""Bytes of the logits that are converted to float32 at a time on other devices. They fit into the cache of a large GPU.
Converting a whole chunk of bfloat16 would need twice the chunk's own memory."""

PAGE_MULTIPLE = 32
"""Only rows whose number of logits is a multiple of this can be as long as one or several pages of memory."""
ROW_GAP = 16
"""Unused numbers after each row of the buffer, if a row could be as long as one or several pages."""


@dataclass(frozen=True, slots=True)
class LogitShape:
    """What a model does to its head's logits: z → ``scale`` · z, then z → ``cap`` · tanh(z / ``cap``) if capped."""

    scale: float = 1.0
    cap: float | None = None

    def __call__(self, logits: Tensor) -> Tensor:
        logits = logits if self.scale == 1 else logits * self.scale
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)

    def slope(self, shaped_logits: Tensor) -> Tensor | float:
        """The derivative of the shape, in terms of its results."""
        return self.scale if self.cap is None else self.scale * (1 - (shaped_logits / self.cap) ** 2)


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
    """Compute log softmax(shape(states · weightᵀ + bias + low · upᵀ)) at the targets, ``rows`` rows at a time.

    Logits have the precision of the model, or of autocast where it is on. Log-probs are float32 (or float64).

    Args:
        states: the last layer's states [M, H].
        weight: the head's weight [V, H].
        bias: the head's bias [V], if it has one.
        targets: token ids [M].
        rows: the largest number of rows of logits that exist at a time.
        shape: what the model does to its logits.
        delta: LoRA's factors ``low`` [M, r] and ``up`` [V, r], if the head has an adapter.
        statistics: names in :data:`halos.policy.logprobs.token_statistics.STATISTICS`.

    Returns:
        Log-probs [M], and the statistics [M, names] of the same logits, without gradient.
    """
    task = _Task(targets, rows, shape, product_dtype(states), tuple(statistics))
    return _apply(task, states, weight, bias, *(delta or (None, None)))


class _Task(NamedTuple):
    # The arguments of the function that have no gradient.
    targets: Tensor
    rows: int
    shape: LogitShape
    dtype: torch.dtype
    statistics: tuple[str, ...]


class _ChunkedLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, task: _Task, states: Tensor, weight: Tensor, bias: Tensor | None, *delta: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        targets, rows, shape, dtype, statistics = task
        low, up = delta
        ctx.rows, ctx.shape, ctx.first_chunk_overwritten = rows, shape, False
        ctx.input_dtypes = tuple(None if value is None else value.dtype for value in (states, weight, bias, low, up))
        states, weight = states.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
        wide_dtype = torch.promote_types(dtype, torch.float32)
        target_logits = states.new_empty(len(states), dtype=wide_dtype)
        normaliser = torch.empty_like(target_logits)
        measured = target_logits.new_empty(len(states), len(statistics))
        chunk_logits = buffer = _logit_buffer(states, weight, rows)
        # Last chunk first: the backward pass begins with the first chunk and finds its logits still in the buffer. The
        # buffer has to be allocated in any case, so keeping these logits costs no memory and saves one product.
        for chunk in reversed([*_slices(len(states), rows)]):
            # oneDNN returns new memory instead of writing into the buffer. Without this line the earlier chunk would
            # not be freed before the product, and two chunks would exist at a time.
            del chunk_logits
            chunk_logits = affine(states[chunk], weight, bias, out=buffer)
            for block, raw_logits in _blocks(chunk, chunk_logits):
                logits = shape(_with_delta(raw_logits.to(wide_dtype), low, up, block))
                target_logits[block], normaliser[block] = _reduced(logits, targets[block])
                if statistics:
                    measured[block] = measure(statistics, logits, normaliser[block], targets[block])
        ctx.save_for_backward(states, weight, bias, low, up, targets, normaliser, chunk_logits)
        ctx.mark_non_differentiable(measured)
        return target_logits - normaliser, measured

    @staticmethod
    def backward(ctx: Any, grad_logprobs: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        states, weight, bias, low, up, targets, normaliser, first_logits = ctx.saved_tensors
        wide_dtype = normaliser.dtype
        # Gradients are summed over chunks in float32, whatever the precision of the products: a sum in bfloat16 would
        # lose the contributions of later chunks.
        grad_states, grad_weight, grad_bias, grad_low, grad_up = (
            torch.zeros_like(value, dtype=wide_dtype) if value is not None and needed else None
            for value, needed in zip((states, weight, bias, low, up), ctx.needs_input_grad[1:], strict=True)
        )
        # ``data`` hides the writes below from autograd, which would refuse a second backward pass because a saved
        # tensor was changed. A second pass is correct: ``first_chunk_overwritten`` makes it compute the chunk again.
        chunk_logits = buffer = first_logits.data
        plain = ctx.shape == LogitShape() and low is None and grad_bias is None
        minus_grad_logprobs = -grad_logprobs
        for chunk in _slices(len(states), ctx.rows):
            if chunk.start or ctx.first_chunk_overwritten:
                del chunk_logits  # as in the forward pass
                chunk_logits = affine(states[chunk], weight, bias, out=buffer)
            for block, raw_logits in _blocks(chunk, chunk_logits):
                if plain:
                    _overwrite_with_gradient(raw_logits, normaliser[block], targets[block], minus_grad_logprobs[block])
                    continue
                # Copied even if no conversion is needed: the copy is overwritten while ``raw_logits`` is still read.
                logits = ctx.shape(_with_delta(raw_logits.to(wide_dtype, copy=True), low, up, block))
                grad_logits = _grad_logits(logits, normaliser[block], targets[block], grad_logprobs[block], ctx.shape)
                if grad_low is not None:
                    grad_low[block] = (grad_logits.to(up.dtype) @ up).to(wide_dtype)
                if grad_up is not None:
                    grad_up += grad_logits.to(low.dtype).T @ low[block]
                if grad_bias is not None:
                    grad_bias += grad_logits.sum(0)
                raw_logits.copy_(grad_logits)
            # From here on the chunk holds the gradient of its logits. The two large products wait until the chunk is
            # complete, because one product of many rows is faster than many of CPU_BLOCK_ROWS.
            if grad_states is not None:
                grad_states[chunk] = affine(chunk_logits, weight.T).to(wide_dtype)
            if grad_weight is not None:
                add_product(grad_weight, chunk_logits.T, states[chunk])
        ctx.first_chunk_overwritten = True
        gradients = zip((grad_states, grad_weight, grad_bias, grad_low, grad_up), ctx.input_dtypes, strict=True)
        return None, *(None if gradient is None else gradient.to(dtype) for gradient, dtype in gradients)


_apply: Callable[..., tuple[Tensor, Tensor]] = _ChunkedLogProbs.apply


def _reduced(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The logits of the targets [rows], and log Σ_v exp(logit) [rows], of logits in float32 or wider [rows, V]."""
    target_logits = logits.gather(1, targets[:, None])[:, 0]
    if device_type(logits) == "cpu":
        return target_logits, logits.logsumexp(1)
    # logsumexp() passes over the logits five times, log_softmax() is one kernel.
    return target_logits, target_logits - logits.log_softmax(1).gather(1, targets[:, None])[:, 0]


def _overwrite_with_gradient(logits: Tensor, normaliser: Tensor, targets: Tensor, minus_grad_logprobs: Tensor) -> None:
    """Write the gradient of unshaped logits [rows, V] over them, in their own precision.

    As :func:`_grad_logits`, with fewer passes over memory: the logits are converted to float32 as they are first read,
    and the gradient is rounded as it is written.
    """
    probabilities = torch.sub(logits, normaliser[:, None]).exp_()
    at_targets = probabilities.gather(1, targets[:, None]) * minus_grad_logprobs[:, None] - minus_grad_logprobs[:, None]
    torch.mul(probabilities, minus_grad_logprobs[:, None], out=logits)
    logits.scatter_(1, targets[:, None], at_targets.to(logits.dtype))


def _grad_logits(
    logits: Tensor, normaliser: Tensor, targets: Tensor, grad_logprobs: Tensor, shape: LogitShape
) -> Tensor:
    """The gradient of the head's logits, written over the shaped ``logits`` [rows, V].

    d log p(target) / dz = 1[target] − softmax(z), times the derivative of the shape.
    """
    slope = shape.slope(logits)  # computed from the logits, so before they are overwritten
    gradient = logits.sub_(normaliser[:, None]).exp_().mul_(-grad_logprobs[:, None])
    gradient.scatter_add_(1, targets[:, None], grad_logprobs[:, None])
    return gradient if shape == LogitShape() else gradient.mul_(slope)


def _logit_buffer(states: Tensor, weight: Tensor, rows: int) -> Tensor:
    """Memory for one chunk of logits [rows, V], which all chunks share."""
    # On a CPU new memory for each chunk takes a fifth of the product's time, because the system clears its pages.
    length = weight.shape[0]
    # Rows whose beginnings are a multiple of a page apart share the same lines of the CPU's cache; a gap avoids that.
    # Other lengths must not have a gap: oneDNN's bfloat16 products on AMX read past the end of rows whose length is not
    # a multiple of 32 (uxlfoundation/oneDNN#5603), and a NaN left in the gap would reach the gradient.
    gap = 0 if length % PAGE_MULTIPLE else ROW_GAP
    return states.new_empty(min(rows, len(states)), length + gap)[:, :length]


def _with_delta(logits: Tensor, low: Tensor | None, up: Tensor | None, block: slice) -> Tensor:
    return logits if low is None or up is None else logits + F.linear(low[block], up).to(logits)


def _slices(length: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, length)) for start in range(0, length, size))


def _blocks(chunk: slice, logits: Tensor) -> Iterator[tuple[slice, Tensor]]:
    # Views of a chunk's logits, each with its place among all rows.
    on_cpu = device_type(logits) == "cpu"
    for block in _slices(len(logits), CPU_BLOCK_ROWS if on_cpu else max(1, BLOCK_BYTES // (4 * logits.shape[1]))):
        yield slice(chunk.start + block.start, chunk.start + block.stop), logits[block]
