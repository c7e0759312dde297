"""vLLM is asked for each completion by a seed of its own; vLLM itself is replaced by what it would be asked."""

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec as ImportSpec
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from halos.data.rows.chat_tokens import ChatTokens, Limits
from halos.policy.loading import ModelSpec
from halos.sampling.engines import Decoding, VLLMEngine
from halos.sampling.prompts import distinct_prompts
from halos.sampling.sampler import Sampler
from halos.toy.source import ToySource

TOKENS = ChatTokens(ModelSpec(path="pkg://halos.toy/reference").tokenizer(), Limits(64))
ASKED = distinct_prompts(ToySource(size=10).train().records, 10, 0)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The seeds that a stub of vLLM was given, batch by batch."""
    batches: list[list[int]] = []

    class LLM:
        def __init__(self, **_: Any) -> None:
            pass

        def generate(self, prompts: Sequence[Any], settings: Sequence[Any], **_: Any) -> list[Any]:
            batches.append([one.seed for one in settings])
            said = SimpleNamespace(token_ids=[5], stop_reason=TOKENS.end_of_turn)
            return [SimpleNamespace(outputs=[said]) for _ in prompts]

    vllm: Any = ModuleType("vllm")
    vllm.__spec__ = ImportSpec("vllm", None)
    vllm.LLM, vllm.SamplingParams = LLM, SimpleNamespace
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    return batches


def test_each_completion_has_a_seed_of_its_own_and_gets_it_again(asked: list[list[int]]) -> None:
    def draw() -> None:
        engine = VLLMEngine("m", TOKENS, Decoding(), dtype="float32")
        made = Sampler(lambda: engine, TOKENS, control="", count=2, batch_size=6, seed=0).draw_all(ASKED)
        assert {tuple(ids) for one in made for ids in one.completions} == {(5, TOKENS.end_of_turn)}

    draw()
    assert [len(batch) for batch in asked] == [6, 6, 6, 2]
    seeds = [seed for batch in asked for seed in batch]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)
    draw()
    assert [seed for batch in asked for seed in batch] == seeds * 2
