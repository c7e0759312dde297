"""``model.packed_attention=auto``: the kernel that attends to packed rows on CUDA, chosen by a trial on the device.

Each candidate computes small packs with the model's own heads, precision, scale, cap and kind of window. The first one
whose output and gradients equal those of attention with all scores in float64 is chosen. The log has its name and the
reasons against the candidates before it. If none is exact, attention is computed piece by piece. On other devices it is
computed piece by piece without a trial.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from halos.data.batches.packing import Pack, map_tensors, pack
from halos.data.rows.token_rows import Row
from halos.policy.logprobs.flex import ScoreOptions, block_mask, flex_attend
from halos.policy.logprobs.varlen import sequences_of, varlen_attend

log = logging.getLogger(__name__)

AUTO, PIECES, FLEX, VARLEN = "auto", "pieces", "flex", "varlen"
TOLERANCE = {torch.float32: 1e-3, torch.float16: 5e-3, torch.bfloat16: 2e-2}
"""Largest difference that rounding explains, as norms: of the difference, divided by that of the exact numbers. A wrong
mask causes a difference ten times as large."""
WINDOW = 40
"""The sliding window in the trial of a layer that has one, in tokens: shorter than the sequences of the trial."""

Attend = Callable[[Pack, Tensor, Tensor, Tensor, ScoreOptions], Tensor]
"""Computes attention of a pack's N queries [1, heads, N, width]. Keys and values are [1, key heads, P + N, width],
of which P are those of the pack before it."""


class Heads(NamedTuple):
    """What the choice depends on: the attention heads of a layer.

    Attributes:
        device: where attention is computed.
        dtype: its precision.
        number: the number of query heads.
        key_number: the number of key heads.
        width: the numbers in a query or key of one head.
        options: how scores become weights.
    """

    device: torch.device
    dtype: torch.dtype
    number: int
    key_number: int
    width: int
    options: ScoreOptions


def _by_flex(item: Pack, query: Tensor, key: Tensor, value: Tensor, options: ScoreOptions) -> Tensor:
    return flex_attend(query, key, value, block_mask(item, options.window), options)


def _by_varlen(item: Pack, query: Tensor, key: Tensor, value: Tensor, options: ScoreOptions) -> Tensor:
    return varlen_attend(query, key, value, sequences_of(item), options)


CANDIDATES: dict[str, Attend] = {FLEX: _by_flex, VARLEN: _by_varlen}
"""The kernels that are tried, in this order."""


@cache  # one trial for all layers and steps
def chosen_attention(heads: Heads) -> str:
    """Return the kernel for these heads: ``flex``, ``varlen`` or ``pieces``. The first call waits for the device."""
    name, refused = first_exact(CANDIDATES, heads)
    reasons = "".join(f"; not {other}, {reason}" for other, reason in refused.items())
    where = (
        f"{heads.number} heads of width {heads.width} in {str(heads.dtype).removeprefix('torch.')} on {heads.device}"
    )
    log.info("packed attention, %s: %s%s", where, name, reasons)
    return name


def first_exact(candidates: Mapping[str, Attend], heads: Heads) -> tuple[str, dict[str, str]]:
    """Return the first candidate that is exact (``pieces`` if none is), and the reasons against those before it."""
    refused = dict[str, str]()
    for name, attend in candidates.items():
        reason = obstacle(attend, heads)
        if reason is None:
            return name, refused
        refused[name] = reason
    return PIECES, refused


def obstacle(attend: Attend, heads: Heads) -> str | None:
    """Try out a kernel. Returns the reason why it cannot be used, or None if it can."""
    options = heads.options
    heads = heads._replace(options=options._replace(window=None if options.window is None else WINDOW))
    try:
        found, wanted = _results(attend, heads), _results(dense_attention, heads)
        errors = {
            name: float((found[name].double() - number).norm() / number.norm()) for name, number in wanted.items()
        }
    except Exception as error:  # whatever a compiler, a driver or a kernel raises
        first_line = next(iter(str(error).strip().splitlines()), "")
        return f"{type(error).__name__}: {first_line}"
    limit = TOLERANCE.get(heads.dtype, 0.0)
    # Not ``error > limit``, which is false for NaN.
    wrong = [f"{name} by {error:.2g}" for name, error in errors.items() if not error <= limit]
    return f"it differs from attention with all scores: {', '.join(wrong)}" if wrong else None


def _results(attend: Attend, heads: Heads) -> dict[str, Tensor]:
    """Output and gradients of packs, and outputs of packs that continue them, without gradient."""
    # The caller may be a checkpointed layer. Its hooks would run the layer again when the trial's backward pass reads
    # saved tensors, so they are replaced here. The caller may also use autocast or torch.no_grad().
    plain_saving = saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)
    results = {}
    with torch.enable_grad(), plain_saving, torch.autocast(heads.device.type, enabled=False):
        # Two sizes, because torch.compile makes code for the first size alone, and at the second one for all sizes.
        for where, packs in (("", _packs(140)), (" at another size", _packs(151))):
            first, second = (map_tensors(item, lambda tensor: tensor.to(heads.device)) for item in packs)
            inputs = _inputs(first, heads)
            output = attend(first, *inputs, heads.options)
            weights = torch.linspace(-1, 1, output.numel(), device=output.device, dtype=torch.float64).view_as(output)
            gradients = torch.autograd.grad((output.double() * weights).sum(), inputs)
            results[f"output{where}"] = output.detach()
            for name, gradient in zip(("queries", "keys", "values"), gradients, strict=True):
                results[f"gradient of {name}{where}"] = gradient
            with torch.no_grad():
                results[f"continued output{where}"] = attend(second, *_inputs(second, heads), heads.options)
    return results


def _packs(prompt: int) -> tuple[Pack, ...]:
    # Longer than a block of FlexAttention. The rows make two trees, and a second pack that continues them.
    ids = tuple(range(200))
    rows = [
        Row("tree", 0, ids[:prompt], (ids[:60], ids[1:38], ids[2:30])),
        Row("row", 1, ids[3:20], (ids[:9], (5,), (6, 7))),
    ]
    return pack(rows, width=60, mismatched=True)


def _inputs(item: Pack, heads: Heads) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator(heads.device).manual_seed(0)  # its own, so that training draws the same numbers

    def states(number: int, tokens: int) -> Tensor:
        drawn = torch.randn(1, number, tokens, heads.width, generator=generator, device=heads.device)
        return drawn.to(heads.dtype).requires_grad_()

    query, keys = states(heads.number, len(item.input_ids)), len(item.node)
    return query, states(heads.key_number, keys), states(heads.key_number, keys)


def dense_attention(item: Pack, query: Tensor, key: Tensor, value: Tensor, options: ScoreOptions) -> Tensor:
    """Attention with all scores of a pack in float64, masked by the definition of a :class:`Pack`."""
    groups = query.shape[1] // key.shape[1]
    query, key, value = (states.double() for states in (query, key, value))
    key, value = (states.repeat_interleave(groups, 1) for states in (key, value))
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if options.scaling is None else options.scaling)
    if options.softcap is not None:
        scores = options.softcap * torch.tanh(scores / options.softcap)
    own_node, own_position = (keys[-len(item.input_ids) :, None] for keys in (item.node, item.position))
    distance = own_position - item.position
    seen = (item.node <= own_node) & (own_node <= item.last) & (distance >= 0)
    if options.window is not None:
        seen = seen & (distance < options.window)
    return scores.masked_fill(~seen, -torch.inf).softmax(-1) @ value
