"""Forwards over packed rows, and the check of which models can do them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from halos.data.batches.packing import Pack, map_tensors, pack
from halos.data.rows.token_rows import Row
from halos.policy.checkpointing import recomputes_within_contexts
from halos.policy.logprobs.attention import PackedAttention, packed_attention
from halos.policy.logprobs.attention_choice import AUTO, PIECES
from halos.policy.logprobs.compiling import uncompiled
from halos.policy.logprobs.head import (
    HeadOptions,
    HeadResults,
    ModelOutput,
    evaluating,
    forward_scored,
    lm_head,
    run,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

_kernels: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()


def attend_by(model: nn.Module, kernel: str) -> None:
    """Let the model attend to packed rows by this kernel from now on; see :class:`PackedAttention`."""
    _kernels[model] = kernel


def attends_by(model: nn.Module) -> str:
    """Return the kernel by which the model attends to packed rows."""
    return _kernels.get(model, PIECES)


def pack_logprobs(model: PreTrainedModel, packs: Sequence[Pack], options: HeadOptions) -> list[HeadResults]:
    """Run one forward for each pack, and return the results for each pack's slots of the grid of completion tokens.

    A pack without gradient continues the detached keys and values of the pack before it, so that those tokens are not
    computed again.

    Args:
        model: a causal language model that :func:`can_pack`.
        packs: packs that continue each other.
        options: how the LM head is computed.
    """
    results, scored, states = list[HeadResults](), list[HeadResults](), list[Tensor]()
    attention: PackedAttention | None = None
    kernel = attends_by(model)
    for index, item in enumerate(packs):
        next_continues = index + 1 < len(packs) and packs[index + 1].continues
        earlier = attention.kept if attention is not None and item.continues else None
        attention = PackedAttention(item, earlier=earlier, keep=next_continues, kernel=kernel)
        with nullcontext() if item.needs_grad else torch.no_grad():
            own, own_states = _forward(model, item, attention, states, options)
            scored.append(own)
            states.append(own_states[0])
            logprobs = torch.cat([one.logprobs for one in scored])[item.sources]
            statistics = torch.cat([one.statistics for one in scored])[item.sources]
            chosen = [one.states for one in scored if one.states is not None]
            results.append(
                HeadResults(logprobs, statistics, torch.cat(chosen)[item.sources] if chosen else None, own.load)
            )
    return results


def _forward(
    model: PreTrainedModel, item: Pack, attention: PackedAttention, earlier: Sequence[Tensor], options: HeadOptions
) -> tuple[HeadResults, Tensor]:
    def forward(**outputs: bool) -> ModelOutput:
        # Positions of the keys include those of the earlier tokens; the model gets those of its own tokens.
        ids, positions = item.input_ids[None], item.position[None, -len(item.input_ids) :]
        with packed_attention(model):
            return run(model, input_ids=ids, position_ids=positions, packed=attention, **outputs)

    def choose(states: Tensor) -> Tensor:
        # The first token of a branch is predicted by the last state of its prompt, perhaps in an earlier pack.
        return torch.cat([*earlier, states[0]])[item.predicts]

    weights = item.occurrences if item.needs_grad else None
    results = forward_scored(model, forward, item.targets, choose, options, weights)
    # Checkpointed layers run again in the backward pass and call this object again. What they keep then would be a
    # second copy of keys and values, which nothing reads.
    attention.keep = False
    return results


_can_pack: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
_warnings_given: set[str] = set()

_TRIAL_ROWS = [
    Row("0", 0, (1, 5, 2, 4), ((3, 2, 1, 5), (5, 3, 3))),
    Row("1", 1, (2, 3, 4, 1, 3, 2), ((1, 4), (5, 2, 4, 1))),
    Row("2", 0, (1, 5, 2, 4), ((2, 4, 5), (1, 1, 4))),
    Row("3", 2, (1, 5, 2, 4, 3, 2, 1, 5, 2), ((4, 1), (3, 5, 1))),
]
_TRIAL_WIDTH = 4
"""Tokens of the longest branch in the trial."""


def can_pack(model: PreTrainedModel) -> bool:
    """Return whether packed rows give the model's own log-probs. This is tried out once, on rows of a few tokens.

    It fails for state-space layers, for biases that grow with distance (ALiBi), and for attention that does not use the
    interface of transformers. Such models get padded rows, and a warning says so.
    """
    if model not in _can_pack:
        reason = _obstacle(model)
        _can_pack[model] = reason is None
        message = f"{type(model).__name__}: prompts are not shared and rows are padded, as {reason}"
        if reason is not None and message not in _warnings_given:
            _warnings_given.add(message)
            log.warning("%s", message)
    return _can_pack[model]


def assume_packing(model: PreTrainedModel) -> None:
    """Let :func:`can_pack` decide by the structure of a model without weights, without a trial."""
    _can_pack[model] = _structural_obstacle(model) is None


def check_packing(model: PreTrainedModel) -> None:
    """Check that batches can be divided by ``data.max_tokens_per_batch``, which needs packed rows.

    Raises:
        ValueError: if the model cannot read packed rows.
    """
    if not can_pack(model):
        found = f"expected a model that can read packed rows, found {type(model).__name__}"
        hint = "lower data.batch_size and raise trainer.accumulate_grad_batches instead"
        raise ValueError(f"data.max_tokens_per_batch: {found}; {hint}")


def _obstacle(model: PreTrainedModel) -> str | None:
    """The reason why the model cannot read packed rows, or None if it can."""
    if (reason := _structural_obstacle(model)) is not None:
        return reason
    kinds = _layer_kinds(model)
    try:
        difference, windows = _try_out(model)
    except Exception as error:  # whatever a model's own code raises when its attention is replaced
        return f"a packed forward failed: {type(error).__name__}: {error}"
    # Some architectures have one window for all layers, and list no kinds.
    sliding_window = getattr(model.config.get_text_config(), "sliding_window", None)
    windowed = "sliding_attention" in kinds or (not kinds and sliding_window is not None)
    # The trial's rows are shorter than usual windows, so their log-probs agree even if the window is ignored.
    if windowed and windows == {None}:
        return "its sliding window is not passed to attention"
    return None if difference < 1 else "packed rows give other log-probs"


def _layer_kinds(model: PreTrainedModel) -> set[str]:
    return set(getattr(model.config.get_text_config(), "layer_types", None) or ())


def _structural_obstacle(model: PreTrainedModel) -> str | None:
    if not getattr(model, "_supports_attention_backend", False):
        return "its attention cannot be replaced"
    if not recomputes_within_contexts(model):
        return "its layers are checkpointed with use_reentrant=True"
    kinds = _layer_kinds(model)
    if not kinds <= {"full_attention", "sliding_attention"}:
        return f"it has layers of other kinds than attention: {', '.join(sorted(kinds))}"
    return None


@torch.no_grad()
def _try_out(model: PreTrainedModel) -> tuple[float, set[int | None]]:
    """Compare packed with separate rows.

    Returns:
        The largest difference between their log-probs, in units of the tolerance for rounding, and the sliding
        windows that the model passed to attention.
    """
    weight = lm_head(model).weight
    trial = pack(_TRIAL_ROWS, width=_TRIAL_WIDTH, mismatched=True)
    packs = [map_tensors(item, lambda tensor: tensor.to(weight.device)) for item in trial]
    with evaluating(model), uncompiled(model), torch.autocast(weight.device.type, enabled=False):
        # The choice of ``auto`` has a trial of its own, in the precision of training.
        kernel = PIECES if attends_by(model) == AUTO else attends_by(model)
        attention = PackedAttention(packs[0], keep=True, kernel=kernel)
        first, states = _forward(model, packs[0], attention, [], HeadOptions())
        continued = PackedAttention(packs[1], earlier=attention.kept, kernel=kernel)
        second, _ = _forward(model, packs[1], continued, [states[0]], HeadOptions())
        packed_logprobs = torch.cat([first.logprobs, second.logprobs])
        separate = _separate_logprobs(model, [row.prompt + branch for row in _TRIAL_ROWS for branch in row.branches])
        expected = torch.zeros_like(packed_logprobs)
        for item in packs:
            branch, token = item.slots // _TRIAL_WIDTH, item.slots % _TRIAL_WIDTH
            starts = torch.tensor([len(row.prompt) for row in _TRIAL_ROWS for _ in row.branches]).to(branch)
            expected[item.sources] = separate[branch, starts[branch] + token].to(expected)
    tolerance = max(float(torch.finfo(weight.dtype).eps) ** 0.5, 1e-4) * (1 + float(expected.abs().max()))
    return float((packed_logprobs - expected).abs().max()) / tolerance, attention.windows


def _separate_logprobs(model: PreTrainedModel, texts: Sequence[tuple[int, ...]]) -> Tensor:
    """Log-probs [B, T] of the tokens of separate rows."""
    # All rows in one forward: each forward reads all weights. Padding is on the right, where no token sees it.
    ids = pad_sequence([torch.tensor(text) for text in texts], batch_first=True).to(lm_head(model).weight.device)
    logprobs = run(model, input_ids=ids).logits[:, :-1].double().log_softmax(-1)
    return F.pad(logprobs.gather(2, ids[:, 1:, None])[:, :, 0], (1, 0))
