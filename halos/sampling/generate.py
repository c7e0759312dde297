"""Sampling completions from a policy, and their log-ratios to the reference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from halos.data.batches.collate import collate
from halos.data.rows.token_rows import Row
from halos.policy.logprobs.compiling import uncompiled
from halos.policy.logprobs.completions import completion_logprobs
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
) -> list[list[int]]:
    """Sample one completion for each prompt.

    This is plain sampling: no top-k, and no top-p unless it is set, whatever the model's own generation config says.

    Args:
        model: a causal language model; its mode, generation config and the global random state are restored.
        prompts: token ids of each prompt.
        end_of_turn: the token that ends a completion.
        pad: the token that fills shorter prompts on the left.
        max_new_tokens: the maximum number of tokens in a completion.
        temperature: 0 takes the likeliest token each time.
        top_p: the share of probability that tokens are drawn from.
        seed: the seed of all draws.
        batch_size: prompts in one call of ``generate``.
        together: all ranks sample the same prompts, because the model is sharded over them.

    Returns:
        The ids of each completion, up to and including its end-of-turn token.
    """
    from transformers import GenerationConfig

    options = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": top_p}
    # generate() divides logits by the temperature; greedy decoding has a switch of its own.
    if temperature == 0:
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
                ids, mask = _left_padded(prompts[start : start + batch_size], pad, model.device)
                output = cast(Tensor, generator.generate(input_ids=ids, attention_mask=mask, synced_gpus=together))
                completions += [_until(row, end_of_turn) for row in output[:, ids.shape[1] :].tolist()]
    finally:
        generator.generation_config = own_config
    return completions


@torch.no_grad()
def log_ratios(
    policy: PreTrainedModel,
    reference: PreTrainedModel,
    policy_prompts: Sequence[Sequence[int]],
    reference_prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    batch_size: int = 128,
) -> Tensor:
    """Compute log π_θ(y|x) − log π_ref(y|x) of each completion; the mean over the policy's samples is the KL.

    The two models may read different prompts: a policy trained by CSFT reads a control token, its reference does not.

    Args:
        policy: π_θ.
        reference: π_ref.
        policy_prompts: n prompts as the policy reads them, as token ids.
        reference_prompts: the same prompts as the reference reads them.
        completions: the token ids of one completion for each prompt.
        batch_size: completions in one forward.

    Returns:
        n log-ratios in nats.
    """

    def logprobs(model: PreTrainedModel, prompts: Sequence[Sequence[int]]) -> Tensor:
        pairs = enumerate(zip(prompts, completions, strict=True))
        rows = [Row(str(i), i, tuple(prompt), (tuple(completion),)) for i, (prompt, completion) in pairs]
        # Four chunks sorted by length, so that a long completion does not pad the others of its batch.
        batches = (collate(rows[i : i + batch_size], chunks=4) for i in range(0, len(rows), batch_size))
        with evaluating(model):
            return torch.cat([completion_logprobs(model, batch.to(model.device)).sum[:, 0] for batch in batches])

    return logprobs(policy, policy_prompts) - logprobs(reference, reference_prompts)


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
