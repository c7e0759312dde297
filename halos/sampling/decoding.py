"""Decodes a batch of completions token by token: prompts are read once, and finished completions leave the batch."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor
from transformers import GenerationMixin

from halos.processes.collectives import all_sum
from halos.sampling.choice import Choose
from halos.sampling.row_cache import Placement, RowCache

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers._typing import GenerativePreTrainedModel

Ids = Sequence[int]
Forward = Callable[[Tensor, Tensor | None, Tensor], Tensor]
"""Ids, mask and positions → the logits [rows, V] of the last column."""
PREFILL_TOKENS = 512
"""From this size on, a CPU reads prompts at full speed. Shorter prompts then go into another forward, with less
padding."""
MOST_PREFILL_TOKENS = 16384
"""Tokens of one forward, padding included, as its activations take memory."""
SHORTER = 0.9
"""Prompts that are longer than this share of the forward's longest do not count as shorter."""
LEAVE = 0.75
"""Finished completions leave when at most this share of the batch is unfinished. Leaving copies the others' keys and
values, and products of a new size cost time once."""
GENERATION_METHODS = (
    "generate",
    "prepare_inputs_for_generation",
    "_update_model_kwargs_for_generation",
    "_prepare_cache_for_generation",
    "_supports_default_dynamic_cache",
)
"""A model that overrides one of them generates in a way of its own."""


def decodes(model: PreTrainedModel) -> bool:
    """Return whether :func:`decode` does for this model what ``generate`` of transformers does.

    It does where ``generate`` calls the model with ids, mask, positions and a ``DynamicCache`` that holds nothing but
    keys and values, with or without sliding windows.
    """
    model_class, generator = type(model), cast("GenerativePreTrainedModel", model)
    if model.config.is_encoder_decoder or getattr(model_class, "_is_stateful", False):
        return False
    if any(_function(model_class, name) is not _function(GenerationMixin, name) for name in GENERATION_METHODS):
        return False
    if not {"input_ids", "attention_mask", "past_key_values"} <= _arguments(model):
        return False
    try:
        return generator._supports_default_dynamic_cache() and bool(_cache(model).layers)
    except NotImplementedError:
        return False


def _function(owner: type, name: str) -> object:
    method = getattr(owner, name, None)
    return getattr(method, "__func__", method)  # a class method is a new object each time


def _arguments(model: PreTrainedModel) -> set[str]:
    return set(inspect.signature(model.forward).parameters)


def _cache(model: PreTrainedModel) -> RowCache:
    return RowCache(model.config.get_text_config(decoder=True))


def decode(
    model: PreTrainedModel,
    prompts: Sequence[Ids],
    choose: Choose,
    *,
    end_of_turn: int,
    pad: int,
    max_new_tokens: int,
    together: bool = False,
) -> list[list[int]]:
    """Decode one completion for each prompt, in one batch.

    Args:
        model: one that :func:`decodes` accepts, in evaluation mode.
        prompts: token ids of each prompt, longest first.
        choose: chooses the next tokens.
        end_of_turn: the token that ends a completion.
        pad: the token that fills shorter prompts on the left.
        max_new_tokens: the maximum number of tokens in a completion.
        together: whether all ranks call the model equally often, because it is sharded over them.

    Returns:
        The ids of each completion; what follows an end-of-turn token has no meaning.
    """
    batch = _Batch(model, prompts, pad=pad, max_new_tokens=max_new_tokens, together=together)
    texts = torch.full((len(prompts), max_new_tokens), end_of_turn, device=model.device)
    with _optimized(model):
        for place in range(max_new_tokens):
            tokens = choose(batch.logits, batch.rows, place)
            texts[batch.rows, place] = tokens
            batch.unfinished &= tokens != end_of_turn
            count = int(batch.unfinished.sum())
            if place + 1 == max_new_tokens or not _any(count, together, model.device):
                break
            # A rank whose completions are all finished feeds them on while other ranks need its shards.
            if 0 < count <= LEAVE * len(tokens):
                tokens = batch.leave(tokens)
            batch.read(tokens)
    completions: list[list[int]] = texts.tolist()
    return completions


def _optimized(model: PreTrainedModel) -> AbstractContextManager[object]:
    # generate() computes mixtures of experts in another way on GPUs once it has read the prompts.
    context: AbstractContextManager[object] = getattr(model, "_optimize_model_for_decode", nullcontext)()
    return context


def _any(count: int, together: bool, device: torch.device) -> bool:
    return bool(all_sum(torch.tensor(count, device=device)) > 0) if together else count > 0


class _Batch:
    """The completions of a batch that are still being decoded.

    Attributes:
        rows: the place of each in the whole batch, [n].
        unfinished: whether it goes on, [n].
        logits: of its next token, [n, V].
    """

    def __init__(
        self, model: PreTrainedModel, prompts: Sequence[Ids], *, pad: int, max_new_tokens: int, together: bool
    ) -> None:
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=model.device)
        self._width = len(prompts[0])
        self._positions = lengths[:, None]
        columns = torch.arange(self._width + max_new_tokens, device=model.device)
        padded = len(prompts[-1]) < self._width
        self._mask = (columns >= self._width - lengths[:, None]).long() if padded else None
        self.rows = torch.arange(len(prompts), device=model.device)
        self.unfinished = torch.ones_like(self.rows, dtype=torch.bool)
        self._cache = _cache(model)
        self._forward: Forward = partial(_last_logits, model, self._cache, _arguments(model))
        self.logits = _prefill(self._forward, prompts, self._cache, pad, model.device, together)
        self._cache.begin(self._width)

    def leave(self, tokens: Tensor) -> Tensor:
        """Drop finished completions; returns the tokens of the others."""
        left = self.unfinished.nonzero()[:, 0]
        self.rows, self.unfinished, self._positions = self.rows[left], self.unfinished[left], self._positions[left]
        self._mask = None if self._mask is None else self._mask[left]
        self._cache.select(left)
        return tokens[left]

    def read(self, tokens: Tensor) -> None:
        """Feed the next token of each completion, [n]."""
        self._width += 1
        mask = None if self._mask is None else self._mask[:, : self._width]
        self.logits = self._forward(tokens[:, None], mask, self._positions)
        self._positions = self._positions + 1


def _prefill(
    forward: Forward, prompts: Sequence[Ids], cache: RowCache, pad: int, device: torch.device, together: bool
) -> Tensor:
    """Read each distinct prompt once; returns the logits [n, V] of all completions' first tokens."""
    rows: dict[tuple[int, ...], list[int]] = {}
    for row, prompt in enumerate(prompts):
        rows.setdefault(tuple(prompt), []).append(row)
    shape = (len(prompts), len(prompts[0]))
    parts, order = [], []
    # One forward where ranks work together, as other ranks have prompts of other lengths.
    for group in [list(rows)] if together else _groups(list(rows)):
        ids, mask = left_padded(group, pad, device)
        group_rows = [row for prompt in group for row in rows[prompt]]
        source = torch.tensor([n for n, prompt in enumerate(group) for _ in rows[prompt]], device=device)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        with cache.placing(Placement(torch.tensor(group_rows, device=device), source, shape)):
            logits = forward(ids, None if len(group[-1]) == ids.shape[1] else mask, positions)
        parts.append(logits[source])
        order += group_rows
    return torch.cat(parts)[torch.tensor(order, device=device).argsort()]


def _groups(prompts: Sequence[tuple[int, ...]]) -> Iterator[list[tuple[int, ...]]]:
    """Divide prompts, longest first, into forwards of about equal lengths."""
    group: list[tuple[int, ...]] = []
    for prompt in prompts:
        longest = len(group[0]) if group else 0
        shorter = longest * len(group) >= PREFILL_TOKENS and len(prompt) <= SHORTER * longest
        too_many = longest * (len(group) + 1) > MOST_PREFILL_TOKENS
        if group and (shorter or too_many):
            yield group
            group = []
        group.append(prompt)
    yield group


def _last_logits(
    model: PreTrainedModel, cache: RowCache, accepted: set[str], ids: Tensor, mask: Tensor | None, positions: Tensor
) -> Tensor:
    optional = {"position_ids": positions, "logits_to_keep": 1}
    inputs = {name: value for name, value in optional.items() if name in accepted}
    inputs |= {"input_ids": ids, "attention_mask": mask, "past_key_values": cache}
    output = model(**inputs, use_cache=True, return_dict=True)
    logits: Tensor = output.logits[:, -1].float()
    return logits


def left_padded(prompts: Sequence[Ids], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return ids and mask [n, longest], padded on the left, so that all completions begin in the same column."""
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), pad)
    mask = torch.zeros_like(ids)
    for i, prompt in enumerate(prompts):
        ids[i, width - len(prompt) :] = torch.tensor(prompt)
        mask[i, width - len(prompt) :] = 1
    return ids.to(device), mask.to(device)
