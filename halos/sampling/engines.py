"""What completions are sampled with: plain transformers, or vLLM behind the same interface."""

from __future__ import annotations

import importlib.util
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from halos.checks import check_number, check_whole
from halos.data.rows.chat_tokens import ChatTokens
from halos.policy.lookup import Policy
from halos.sampling.generate import sample

Ids = Sequence[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoding:
    """How completions are drawn. Temperature 0 takes the likeliest token each time."""

    max_new_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        check_whole("max_new_tokens", self.max_new_tokens, 1)
        check_number("temperature", self.temperature)
        if type(self.top_p) not in (int, float) or not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: expected a share in (0, 1], found {self.top_p!r}")


class Engine(Protocol):
    """Samples completions; the same prompts and seed give the same completions."""

    def generate(self, prompts: Sequence[Ids], *, seed: int) -> list[list[int]]:
        """One completion's ids for each prompt's ids, up to and with the end-of-turn token."""
        ...


class TransformersEngine:
    """``generate`` of transformers, on one left-padded batch."""

    def __init__(self, model: Any, tokens: ChatTokens, decoding: Decoding) -> None:
        self.model, self.tokens, self.decoding = model, tokens, decoding

    def generate(self, prompts: Sequence[Ids], *, seed: int) -> list[list[int]]:
        return sample(
            self.model,
            prompts,
            end_of_turn=self.tokens.end_of_turn,
            pad=self.tokens.tokenizer.pad_token_id,
            max_new_tokens=self.decoding.max_new_tokens,
            temperature=self.decoding.temperature,
            top_p=self.decoding.top_p,
            seed=seed,
            batch_size=len(prompts),
        )


class VLLMEngine:
    """vLLM's offline engine; each completion has a seed of its own.

    Raises ``ValueError`` if vLLM is not installed.
    """

    def __init__(self, path: str, tokens: ChatTokens, decoding: Decoding, *, dtype: str) -> None:
        check_installed("vllm")
        from vllm import LLM

        self.tokens, self.decoding = tokens, decoding
        self._llm = LLM(model=path, dtype=dtype)

    def generate(self, prompts: Sequence[Ids], *, seed: int) -> list[list[int]]:
        from vllm import SamplingParams

        end = self.tokens.end_of_turn
        seeds = random.Random(seed)  # seed + n would also be among those of the next batch
        settings = [
            SamplingParams(
                max_tokens=self.decoding.max_new_tokens,
                temperature=self.decoding.temperature,
                top_p=self.decoding.top_p,
                stop_token_ids=[end],
                seed=seeds.getrandbits(63),
                detokenize=False,
            )
            for _ in prompts
        ]
        asked: list[Any] = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        outputs = self._llm.generate(asked, settings, use_tqdm=False)
        return [_with_end(output.outputs[0], end) for output in outputs]


def _with_end(output: Any, end: int) -> list[int]:
    ids = list(output.token_ids)
    return [*ids, end] if output.stop_reason == end and ids[-1:] != [end] else ids


def check_engine(name: Any, policy: Policy, *, key: str = "policy") -> None:
    """Raise ``ValueError`` unless the policy, given under ``key``, can be sampled by this engine; loads nothing."""
    if policy.is_classifier:
        raise ValueError(f"{key}: {policy.name} is a reward model, which does not generate")
    if name == "vllm" and policy.spec.lora.enabled:
        raise ValueError(
            f"engine: expected transformers for {policy.name} with the adapter {policy.spec.lora.path}, which vllm "
            "would leave out; found vllm"
        )
    check_installed(name)


def check_installed(name: Any) -> None:
    """Raise ``ValueError`` for an engine that there is not, or that is not installed."""
    if name not in ("transformers", "vllm"):
        raise ValueError(f"engine: expected transformers or vllm, found {name!r}")
    if name == "vllm" and importlib.util.find_spec("vllm") is None:
        raise ValueError("engine=vllm: vLLM is not installed; pip install 'halos[vllm]', or use engine=transformers")


def make_engine(name: str, policy: Policy, tokens: ChatTokens, decoding: Decoding, **where: str) -> Engine:
    """The engine of this name (transformers or vllm); ``where``: device and precision."""
    check_engine(name, policy)
    if name == "transformers":
        return TransformersEngine(policy.load(**where, vocabulary=len(tokens.tokenizer)), tokens, decoding)
    dtype = "bfloat16" if where["precision"] == "bf16-true" else "float32"
    return VLLMEngine(policy.spec.path, tokens, decoding, dtype=dtype)
