"""Completions sampled from a policy, and their KL to the reference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from halos.data.batches.collate import collate
from halos.data.rows.token_rows import Row
from halos.policy.logprobs.compiling import uncompiled
from halos.policy.logprobs.completions import completion_logprobs
from halos.policy.logprobs.head import evaluating


@torch.no_grad()
def sample(
    model: Any,
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
    """One completion's ids for each prompt's ids, up to and with the end-of-turn token.

    Plain sampling: no top-k, and no top-p unless asked for, whatever the model's own generation config says.
    Temperature 0 takes the likeliest token each time. ``together``: all ranks sample the same, as the model is divided
    over them.
    """
    from transformers import GenerationConfig

    drawn = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": top_p}
    config = GenerationConfig(
        **(drawn if temperature > 0 else {"do_sample": False}),
        max_new_tokens=max_new_tokens,
        eos_token_id=end_of_turn,
        pad_token_id=pad,
    )
    was_training, own_config = model.training, model.generation_config
    model.eval()
    model.generation_config = config  # generate() would take what is unset here from the model's own
    completions: list[list[int]] = []
    try:
        with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []), uncompiled(model):
            torch.manual_seed(seed)
            for start in range(0, len(prompts), batch_size):
                ids, mask = _left_padded(prompts[start : start + batch_size], pad, model.device)
                out = model.generate(input_ids=ids, attention_mask=mask, synced_gpus=together)
                completions += [_until(row, end_of_turn) for row in out[:, ids.shape[1] :].tolist()]
    finally:
        model.train(was_training)
        model.generation_config = own_config
    return completions


@torch.no_grad()
def log_ratios(
    policy: Any,
    reference: Any,
    policy_prompts: Sequence[Sequence[int]],
    reference_prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    batch_size: int = 128,
) -> torch.Tensor:
    """log π_θ(y|x) − log π_ref(y|x) of each completion [n], in nats; its mean over the policy's samples is the KL.

    The two may be asked with different prompts: a policy trained by CSFT reads a control token, its reference does not.
    """

    def logprobs(model: Any, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
        rows = [
            Row(str(i), i, tuple(p), (tuple(c),)) for i, (p, c) in enumerate(zip(prompts, completions, strict=True))
        ]
        parts = (collate(rows[i : i + batch_size], chunks=4) for i in range(0, len(rows), batch_size))
        with evaluating(model):
            return torch.cat([completion_logprobs(model, part.to(model.device)).sum[:, 0] for part in parts])

    return logprobs(policy, policy_prompts) - logprobs(reference, reference_prompts)


def _left_padded(prompts: Sequence[Sequence[int]], pad: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), pad)
    mask = torch.zeros_like(ids)
    for i, prompt in enumerate(prompts):
        ids[i, width - len(prompt) :] = torch.tensor(prompt)
        mask[i, width - len(prompt) :] = 1
    return ids.to(device), mask.to(device)


def _until(ids: list[int], end: int) -> list[int]:
    return ids[: ids.index(end) + 1] if end in ids else ids
