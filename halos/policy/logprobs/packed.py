"""Forwards over packed rows, and which models can do them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from halos.data.batches.packing import Pack, pack
from halos.data.rows.token_rows import Row
from halos.policy.logprobs.attention import PackedAttention, attends_by_flex, packed_attention, recomputes_alike
from halos.policy.logprobs.compiling import uncompiled
from halos.policy.logprobs.head import Scored, evaluating, forward_scored

log = logging.getLogger(__name__)


def pack_logprobs(
    model: Any, packs: Sequence[Pack], *, with_states: bool = False, **head: Any
) -> list[tuple[Tensor, Tensor, Any]]:
    """For each pack its branches' log-probs [S], statistics [S, names] and, where asked for, the states [S, H] that
    predict them.

    ``head``: the options of :func:`halos.policy.logprobs.head.forward_scored`.

    A pack that the loss only reads is computed without gradient, on the detached keys and values of the prompts in the
    pack before.
    """
    found: list[tuple[Tensor, Tensor, Any]] = []
    done: list[Scored] = []
    attention: PackedAttention | None = None
    flex = attends_by_flex(model)
    for number, part in enumerate(packs):
        more = number + 1 < len(packs) and packs[number + 1].continues
        earlier = attention.kept if attention is not None and part.continues else None
        attention = PackedAttention(part, earlier=earlier, keep=more, flex=flex)
        with nullcontext() if part.needs_grad else torch.no_grad():
            done.append(_forward(model, part, attention, [scored.all_states[0] for scored in done], **head))
            gather = partial(_gathered, done, part)
            found.append((gather("logprobs"), gather("statistics"), gather("states") if with_states else None))
    return found


def _gathered(done: Sequence[Scored], part: Pack, name: str) -> Tensor:
    return torch.cat([getattr(scored, name) for scored in done])[part.sources]


def _forward(model: Any, part: Pack, attention: PackedAttention, earlier: list[Tensor], **head: Any) -> Scored:
    def forward() -> Any:
        ids, positions = part.input_ids[None], part.position[None, -len(part.input_ids) :]
        with packed_attention(model):
            return model(input_ids=ids, position_ids=positions, packed=attention, use_cache=False)

    def choose(states: Tensor) -> Tensor:
        return torch.cat([*earlier, states[0]])[part.predicts]

    scored = forward_scored(model, forward, part.targets, choose, **head)
    attention.keep = False  # layers that are checkpointed run again
    return scored


_can: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
_said: set[str] = set()

_PROBE = [
    Row("0", 0, (1, 5, 2, 4), ((3, 2, 1, 5), (5, 3, 3))),
    Row("1", 1, (2, 3, 4, 1, 3, 2), ((1, 4), (5, 2, 4, 1))),
    Row("2", 0, (1, 5, 2, 4), ((2, 4, 5), (1, 1, 4))),
]


def can_pack(model: Any) -> bool:
    """Whether packed rows give this model's log-probs: tried out once, on rows of a few tokens.

    State-space layers, biases that grow with distance (ALiBi) and attention that does not pass through the interface
    of transformers give others; such models get padded rows of their own, and a message says so.
    """
    if model not in _can:
        reason = _obstacle(model)
        _can[model] = reason is None
        message = f"{type(model).__name__}: prompts are not shared and rows are padded, as {reason}"
        if reason is not None and message not in _said:
            _said.add(message)
            log.warning("%s", message)
    return _can[model]


def check_packing(model: Any) -> None:
    """Raise ``ValueError`` if batches cannot be computed in parts, as that takes packed rows."""
    if not can_pack(model):
        raise ValueError(
            f"data.max_tokens_per_batch: expected a model that can read packed rows, found {type(model).__name__}, "
            "which cannot; lower data.batch_size and raise trainer.accumulate_grad_batches instead"
        )


def _obstacle(model: Any) -> str | None:
    if not getattr(model, "_supports_attention_backend", False):
        return "its attention cannot be replaced"
    if not recomputes_alike(model):
        return "its layers are checkpointed with use_reentrant=True"
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ())
    if not kinds <= {"full_attention", "sliding_attention"}:
        return f"it has layers of other kinds than attention: {', '.join(sorted(kinds))}"
    try:
        difference, windows = _try_out(model)
    except Exception as error:  # whatever a model's own code raises when its attention is replaced
        return f"a packed forward failed: {type(error).__name__}: {error}"
    # Some architectures have one window for all layers, and name no kinds.
    windowed = "sliding_attention" in kinds or (not kinds and getattr(config, "sliding_window", None) is not None)
    if windowed and windows == {None}:
        return "its sliding window is not told to attention"
    return None if difference < 1 else "packed rows give other log-probs"


@torch.no_grad()
def _try_out(model: Any) -> tuple[float, set[int | None]]:
    """The difference between packed and separate rows, in units of what rounding may do, and the windows asked for."""
    weight = model.get_output_embeddings().weight
    packs = [part.map(lambda tensor: tensor.to(weight.device)) for part in pack(_PROBE, width=4, mismatched=True)]
    with evaluating(model), uncompiled(model), torch.autocast(weight.device.type, enabled=False):
        flex = attends_by_flex(model)
        attention = PackedAttention(packs[0], keep=True, flex=flex)
        first = _forward(model, packs[0], attention, [])
        continued = PackedAttention(packs[1], earlier=attention.kept, flex=flex)
        second = _forward(model, packs[1], continued, [first.all_states[0]])
        found = torch.cat([first.logprobs, second.logprobs])
        separate = _separately(model, [row.prompt + branch for row in _PROBE for branch in row.branches])
        expected = torch.zeros_like(found)
        for part in packs:
            number, token = part.slots // 4, part.slots % 4
            starts = torch.tensor([len(row.prompt) for row in _PROBE for _ in row.branches]).to(number)
            expected[part.sources] = separate[number, starts[number] + token].to(expected)
    within = max(float(torch.finfo(weight.dtype).eps) ** 0.5, 1e-4) * (1 + float(expected.abs().max()))
    return float((found - expected).abs().max()) / within, attention.windows


def _separately(model: Any, texts: Sequence[tuple[int, ...]]) -> Tensor:
    """log p of the tokens [B, T] of separate rows, in one forward, as each reads all weights; padding is on the
    right, where no token sees it."""
    rows = [torch.tensor(text) for text in texts]
    ids = pad_sequence(rows, batch_first=True).to(model.get_output_embeddings().weight.device)
    logprobs = model(input_ids=ids, use_cache=False).logits[:, :-1].double().log_softmax(-1)
    return F.pad(logprobs.gather(2, ids[:, 1:, None])[:, :, 0], (1, 0))
