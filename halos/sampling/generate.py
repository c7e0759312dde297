"""Sampling completions from a policy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from halos.policy.kernels.matmul import small_products_by_mkl
from halos.policy.logprobs.compiling import uncompiled
from halos.policy.logprobs.head import evaluating
from halos.sampling.choice import Choice, Choose, uniform_draws

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers._typing import GenerativePreTrainedModel

Ids = Sequence[int]


@torch.no_grad()
def sample(
    model: PreTrainedModel,
    prompts: Sequence[Ids],
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
        batch_size: completions that are decoded at a time.
        together: whether all ranks take part in each call, because the model is sharded over them.
        draws: a random number in [0, 1) for each prompt and token, [n, max_new_tokens]; None: :func:`uniform_draws` of
            ``seed``. A completion does not depend on the other prompts of its batch.

    Returns:
        The ids of each completion, up to and including its end-of-turn token.
    """
    from halos.sampling.decoding import decode, decodes

    if draws is None:
        draws = uniform_draws(len(prompts), max_new_tokens, seed=seed)
    decoder = decode if decodes(model) else _generate
    # Longest first, so that a batch has little padding, and what does not fit into memory shows at once.
    order = sorted(range(len(prompts)), key=lambda n: (len(prompts[n]), tuple(prompts[n])), reverse=True)
    completions: list[list[int]] = [[] for _ in prompts]
    lengths = {"end_of_turn": end_of_turn, "pad": pad, "max_new_tokens": max_new_tokens}
    devices = [model.device] if model.device.type == "cuda" else []
    # Layers are compiled for the shapes of training; decoding feeds one token at a time.
    with ExitStack() as restored:
        for context in (uncompiled(model), evaluating(model), _without_router_loss(model), small_products_by_mkl()):
            restored.enter_context(context)
        restored.enter_context(torch.random.fork_rng(devices))
        torch.manual_seed(seed)  # for models that draw in evaluation mode
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            choose = Choice(draws[batch].to(model.device), temperature=temperature, top_p=top_p)
            texts = decoder(model, [prompts[n] for n in batch], choose, together=together, **lengths)
            for n, ids in zip(batch, texts, strict=True):
                completions[n] = through_end(ids, end_of_turn)
    return completions


@contextmanager
def _without_router_loss(model: PreTrainedModel) -> Iterator[None]:
    # A mixture would compute its load-balancing loss, with a mask that has more columns than the tokens it reads.
    config = model.config.get_text_config(decoder=True)
    if not getattr(config, "output_router_logits", False):
        yield
        return
    config.output_router_logits = False
    try:
        yield
    finally:
        config.output_router_logits = True


def _generate(
    model: PreTrainedModel,
    prompts: Sequence[Ids],
    choose: Choose,
    *,
    end_of_turn: int,
    pad: int,
    max_new_tokens: int,
    together: bool,
) -> list[list[int]]:
    """Do what :func:`halos.sampling.decoding.decode` does, for any architecture, with ``generate`` of transformers."""
    from transformers import GenerationConfig, LogitsProcessorList

    from halos.sampling.decoding import left_padded

    options = {"max_new_tokens": max_new_tokens, "eos_token_id": end_of_turn, "pad_token_id": pad, "do_sample": False}
    generator = cast("GenerativePreTrainedModel", model)
    own_config = generator.generation_config
    # generate() fills every value that is unset in its argument from the model's own config, so the whole config is
    # replaced for the time of the call.
    generator.generation_config = GenerationConfig.from_dict(options)
    try:
        ids, mask = left_padded(prompts, pad, model.device)
        chosen = LogitsProcessorList([_Chosen(choose, ids.shape[1])])
        inputs = {"input_ids": ids, "attention_mask": mask, "logits_processor": chosen}
        output = cast(Tensor, generator.generate(**inputs, synced_gpus=together))
    finally:
        generator.generation_config = own_config
    completions: list[list[int]] = output[:, ids.shape[1] :].tolist()
    return completions


class _Chosen:
    """Leaves one possible token to each completion."""

    def __init__(self, choose: Choose, prompt_width: int) -> None:
        self.choose, self.prompt_width = choose, prompt_width

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        completions = torch.arange(len(scores), device=scores.device)
        tokens = self.choose(scores, completions, input_ids.shape[1] - self.prompt_width)
        return torch.full_like(scores, -torch.inf).scatter(1, tokens[:, None], 0.0)


def through_end(ids: list[int], end: int) -> list[int]:
    """Return the ids up to and including the first end-of-turn token."""
    return ids[: ids.index(end) + 1] if end in ids else ids
