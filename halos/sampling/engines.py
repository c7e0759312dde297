"""Sampling engines: the model in this process, or vLLM with the same interface."""

from __future__ import annotations

import importlib.util
import random
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import TYPE_CHECKING, Protocol

from halos.checks import check_number, check_share, check_whole
from halos.data.rows.chat_tokens import ChatTokens
from halos.policy.lookup import Policy
from halos.sampling.generate import sample

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Ids = Sequence[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoding:
    """How completions are drawn.

    Attributes:
        max_new_tokens: the maximum number of tokens in a completion.
        temperature: the sampling temperature; 0 takes the most probable token each time.
        top_p: the share of probability that tokens are drawn from, in (0, 1].
    """

    max_new_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        check_whole("max_new_tokens", self.max_new_tokens, 1)
        check_number("temperature", self.temperature)
        check_share("top_p", self.top_p)


class Engine(Protocol):
    """Samples completions; the same prompts and seed give the same completions."""

    def generate(self, prompts: Sequence[Ids], *, seed: int) -> list[list[int]]:
        """Sample one completion for each prompt, up to and including its end-of-turn token (all as token ids)."""
        ...


class TransformersEngine:
    """Samples from a model of transformers, in one batch."""

    def __init__(self, model: PreTrainedModel, tokens: ChatTokens, decoding: Decoding) -> None:
        self.model, self.tokens = model, tokens
        self.decoding = {field.name: getattr(decoding, field.name) for field in fields(Decoding)}

    def generate(self, prompts: Sequence[Ids], *, seed: int) -> list[list[int]]:
        # One batch, because the sampler has divided the prompts already.
        options = {**self.decoding, "seed": seed, "batch_size": len(prompts)}
        return sample(self.model, prompts, end_of_turn=self.tokens.end_of_turn, pad=self.tokens.pad, **options)


class VLLMEngine:
    """Samples with vLLM's offline engine; each completion has its own seed.

    Raises:
        ValueError: vLLM is not installed.
    """

    def __init__(
        self, path: str, tokens: ChatTokens, decoding: Decoding, *, dtype: str, trust_remote_code: bool = False
    ) -> None:
        check_installed("vllm")
        from vllm import LLM

        self.tokens, self.decoding = tokens, decoding
        self._llm = LLM(model=path, dtype=dtype, trust_remote_code=trust_remote_code)

    def generate(self, prompts: Sequence[Ids], *, seed: int) -> list[list[int]]:
        from vllm import SamplingParams

        end = self.tokens.end_of_turn
        # Drawn, because seed + n would occur again in the batch whose seed is one higher.
        seeds = random.Random(seed)
        decoding = self.decoding
        numbers = {"max_tokens": decoding.max_new_tokens, "temperature": decoding.temperature, "top_p": decoding.top_p}
        # Texts come from our own decoding, as with the other engine.
        make = partial(SamplingParams, **numbers, stop_token_ids=[end], detokenize=False)
        settings = [make(seed=seeds.getrandbits(63)) for _ in prompts]
        requests = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        completions = [output.outputs[0] for output in self._llm.generate(requests, settings, use_tqdm=False)]
        return [_with_end(list(one.token_ids), one.stop_reason, end) for one in completions]


def _with_end(ids: list[int], stop_reason: int | str | None, end: int) -> list[int]:
    # Versions of vLLM differ in whether the token that stopped a completion is among its ids.
    return [*ids, end] if stop_reason == end and ids[-1:] != [end] else ids


def check_engine(name: str, policy: Policy, *, key: str = "policy") -> None:
    """Check that an engine can sample a policy; loads nothing.

    Args:
        name: ``transformers`` or ``vllm``.
        policy: the policy to sample.
        key: the configuration key of the policy, for the message.

    Raises:
        ValueError: the policy does not generate, or the engine is unknown, not installed or ignores its adapter.
    """
    if policy.is_classifier:
        found = f"the reward model {policy.name}, which does not generate"
        raise ValueError(f"{key}: expected a language model, found {found}")
    if name == "vllm" and policy.spec.lora.enabled:
        adapted = f"{policy.name} with the adapter {policy.spec.lora.path}, which vllm would leave out"
        raise ValueError(f"engine: expected transformers for {adapted}; found vllm")
    check_installed(name)


def check_installed(name: str) -> None:
    """Check that an engine of this name exists and is installed.

    Raises:
        ValueError: it does not exist, or is not installed.
    """
    if name not in ("transformers", "vllm"):
        raise ValueError(f"engine: expected transformers or vllm, found {name!r}")
    # find_spec, because importing vLLM takes many seconds.
    if name == "vllm" and importlib.util.find_spec("vllm") is None:
        raise ValueError("engine=vllm: vLLM is not installed; pip install 'halos[vllm]', or use engine=transformers")


def make_engine(
    name: str,
    policy: Policy,
    tokens: ChatTokens,
    decoding: Decoding,
    *,
    device: str,
    precision: str,
    loaded: PreTrainedModel | None = None,
) -> Engine:
    """Load a policy into an engine.

    Args:
        name: ``transformers`` or ``vllm``.
        policy: the policy to sample.
        tokens: turns prompts into token ids and completions into text.
        decoding: how completions are drawn.
        device: where ``transformers`` computes, such as ``auto``.
        precision: the number type of the weights, such as ``32-true``.
        loaded: the policy's model if it is in memory already; vLLM loads its own copy anyway.

    Raises:
        ValueError: see :func:`check_engine`.
    """
    check_engine(name, policy)
    if name == "transformers":
        if loaded is None:
            loaded = policy.load(device=device, precision=precision, vocabulary=len(tokens.tokenizer))
        return TransformersEngine(loaded, tokens, decoding)
    dtype = "bfloat16" if precision == "bf16-true" else "float32"
    trusted = policy.spec.trust_remote_code
    return VLLMEngine(policy.spec.path, tokens, decoding, dtype=dtype, trust_remote_code=trusted)
