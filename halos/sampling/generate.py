"""Sampling completions from a policy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from halos.policy.logprobs.compiling import uncompiled
from halos.policy.logprobs.head import evaluating

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers._typing import GenerativePreTrainedModel


@torch.no_grad()
def sample(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    end_of_turn: int,
    pad: int,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    batch_size: int = 256,
    together: bool = False,
    draws: Tensor | None = None,
) -> list[list[int]]:
    """Sample one completion for each prompt.

    This is plain sampling: no top-k, and no top-p unless it is set, whatever the model's own generation config says.

    Args:
        model: a causal language model; its mode, generation config and the global random state are restored.
        prompts: token ids of each prompt.
        end_of_turn: the token that ends a completion.
        pad: the token that fills shorter prompts on the left.
        max_new_tokens: the maximum number of tokens in a completion.
        temperature: the sampling temperature; 0 takes the most probable token each time.
        top_p: the share of probability that tokens are drawn from.
        seed: the seed of all draws.
        batch_size: prompts in one call of ``generate``.
        together: whether all ranks take part in each call, because the model is sharded over them.
        draws: a random number in [0, 1) for each prompt and token, [n, max_new_tokens], in place of ``seed``. A
            completion then does not depend on the other prompts of its batch. Only for temperature 1 without top-p.

    Returns:
        The ids of each completion, up to and including its end-of-turn token.
    """
    from transformers import GenerationConfig, LogitsProcessorList

    options = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": top_p}
    # generate() divides logits by the temperature; greedy decoding has a switch of its own.
    if temperature == 0 or draws is not None:
        options = {"do_sample": False}
    lengths = {"max_new_tokens": max_new_tokens, "eos_token_id": end_of_turn, "pad_token_id": pad}
    generator = cast("GenerativePreTrainedModel", model)
    own_config = generator.generation_config
    # generate() fills every value that is unset in its argument from the model's own config, so the whole config is
    # replaced for the time of the call.
    generator.generation_config = GenerationConfig.from_dict(options | lengths)
    completions: list[list[int]] = []
    try:
        devices = [model.device] if model.device.type == "cuda" else []
        # generate() draws from the global generators; forking them keeps training's own draws as they were. Layers are
        # compiled for the shapes of training; generation feeds one token at a time.
        with torch.random.fork_rng(devices), uncompiled(model), evaluating(model):
            torch.manual_seed(seed)
            for start in range(0, len(prompts), batch_size):
                batch = slice(start, start + batch_size)
                ids, mask = _left_padded(prompts[batch], pad, model.device)
                drawn = [] if draws is None else [_Drawn(draws[batch].to(model.device), ids.shape[1])]
                processors = LogitsProcessorList(drawn)
                inputs = {"input_ids": ids, "attention_mask": mask, "logits_processor": processors}
                output = cast(Tensor, generator.generate(**inputs, synced_gpus=together))
                completions += [_until(row, end_of_turn) for row in output[:, ids.shape[1] :].tolist()]
    finally:
        generator.generation_config = own_config
    return completions


def uniform_draws(prompts: int, tokens: int, *, seed: int) -> Tensor:
    """Draw the random numbers of :func:`sample`'s ``draws`` from a seed, [prompts, tokens] in [0, 1)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(prompts, tokens, dtype=torch.float64, generator=generator)


class _Drawn:
    """Leaves each completion only one possible token: the one at which the cumulative probability passes its draw."""

    def __init__(self, draws: Tensor, prompt_width: int) -> None:
        self.draws, self.prompt_width = draws, prompt_width

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        cumulative = scores.double().softmax(-1).cumsum(-1)
        # Times the last value, which rounding keeps from being 1. Right of equal values: no impossible token is drawn.
        draws = self.draws[:, input_ids.shape[1] - self.prompt_width, None] * cumulative[:, -1:]
        tokens = torch.searchsorted(cumulative, draws, right=True)
        return torch.full_like(scores, -torch.inf).scatter(1, tokens, 0.0)


def _left_padded(prompts: Sequence[Sequence[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    # Padding is on the left so that all completions of a batch begin in the same column.
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), pad)
    mask = torch.zeros_like(ids)
    for i, prompt in enumerate(prompts):
        ids[i, width - len(prompt) :] = torch.tensor(prompt)
        mask[i, width - len(prompt) :] = 1
    return ids.to(device), mask.to(device)


def _until(ids: list[int], end: int) -> list[int]:
    return ids[: ids.index(end) + 1] if end in ids else ids
