"""``model.packed_attention=auto``: the kernel that attends to packed rows on CUDA, chosen by a trial on the device.

The candidates compute a small pack with the model's own heads, precision, scale, cap and kind of window. The first one
whose output and gradients are those of attention with all scores in float64 is taken, and the log has its name, and why
the ones before it were refused. If none is exact, a pack is attended to piece by piece. On other devices that is so
without a trial.
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
"""Norm of a difference that rounding explains, relative to the norm of the numbers; a wrong mask makes it ten times as
large."""
WINDOW = 40
"""Tokens that a query sees in the trial where a layer has a sliding window: less than the trial's sequences have."""

Attend = Callable[[Pack, Tensor, Tensor, Tensor, ScoreOptions], Tensor]
"""Attention of the queries [1, heads, N, width] of a pack, with its keys and values [1, key heads, P + N, width]."""


class Heads(NamedTuple):
    """What the choice depends on.

    Attributes:
        device: where attention is computed.
        dtype: its precision.
        number: query heads.
        key_number: key heads.
        width: of a head.
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
"""In the order of their trials."""


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
    """Return the first candidate that computes attention exactly, ``pieces`` if none does, and why others do not."""
    refused = dict[str, str]()
    for name, attend in candidates.items():
        reason = obstacle(attend, heads)
        if reason is None:
            return name, refused
        refused[name] = reason
    return PIECES, refused


def obstacle(attend: Attend, heads: Heads) -> str | None:
    """Try a kernel out. Returns why it cannot be used, or None if it can."""
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
    # The caller may be within a layer that is checkpointed, whose hooks would run the layer again when the trial's
    # backward pass asks for what was saved. It may also be within autocast, or without gradient.
    plain_saving = saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)
    results = {}
    with torch.enable_grad(), plain_saving, torch.autocast(heads.device.type, enabled=False):
        # Of two sizes: code that is compiled for the first one is compiled again, for all sizes, at the second.
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
    # More than a block of FlexAttention; a tree, a short row without branches, and a pack that continues the tree.
    ids = tuple(range(200))
    rows = [
        Row("tree", 0, ids[:prompt], (ids[:60], ids[1:38], ids[2:30])),
        Row("row", 1, ids[3:20], (ids[:9], (5,), (6, 7))),
    ]
    return pack(rows, width=60, mismatched=True)


def _inputs(item: Pack, heads: Heads) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator(heads.device).manual_seed(0)  # of its own: training draws the same numbers as without

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
