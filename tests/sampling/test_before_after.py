"""Reference against policy: shares, rewards and KL, against exact values."""

from typing import Any

import pytest
import torch

from halos.data.rows.chat_tokens import ChatTokens, Limits
from halos.policy.loading import ModelSpec
from halos.sampling import before_after as comparison
from halos.sampling.before_after import Comparison, Samples, compare
from halos.toy.model import GOOD

SPEC = ModelSpec(path="pkg://halos.toy/reference")
PROMPT = "i bought a lamp on monday. i paid twice."


class FakeJudge:
    """Likes texts with "thanks"; asks one question again and again."""

    def reward(self, prompt: str, completion: str) -> float:
        assert prompt == PROMPT
        return len(completion) / 1000

    def desirable(self, prompt: str, completion: str) -> bool:
        return "thanks" in completion

    def prompts(self, size: int) -> list[str]:
        return [PROMPT] * size


@pytest.fixture(scope="module")
def tokens() -> ChatTokens:
    return ChatTokens(SPEC.tokenizer(), Limits(64))


@pytest.fixture(scope="module")
def models() -> tuple[Any, Any]:
    policy, reference = SPEC.load().eval(), SPEC.load().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        weight = policy.get_output_embeddings().weight
        weight += 0.15 * torch.randn(weight.shape, generator=generator)
    return policy, reference


def compared(models: tuple[Any, Any], tokens: ChatTokens, **options: Any) -> Comparison:
    options = {"size": 3, "max_new_tokens": 20, "seed": 0, "control": lambda _: "", **options}
    return compare(*models, tokens, FakeJudge(), **options)


@pytest.mark.long
@pytest.mark.slow
def test_kl_and_shares_are_those_of_the_exact_distributions(models: tuple[Any, Any], tokens: ChatTokens) -> None:
    ids = torch.tensor([tokens.prompt(PROMPT)])
    with torch.no_grad():
        log_p, log_q = (model(input_ids=ids).logits[0, -1].log_softmax(-1) for model in models)
    exact = float((log_p.exp() * (log_p - log_q)).sum())
    assert 0.2 < exact < 2
    found = compared(models, tokens, size=2000, max_new_tokens=1)
    assert found.kl == pytest.approx(exact, abs=0.1)
    (word,) = tokens.tokenizer("thanks", add_special_tokens=False)["input_ids"]
    assert found.policy.desirable_share == pytest.approx(float(log_p[word].exp()), abs=0.04)
    assert found.reference.desirable_share == pytest.approx(float(log_q[word].exp()), abs=0.04)


def test_the_same_model_twice_says_the_same_and_has_no_kl(models: tuple[Any, Any], tokens: ChatTokens) -> None:
    found = compared((models[1], models[1]), tokens)
    assert found.policy == found.reference
    assert found.kl == 0.0


def test_what_is_judged_is_the_text_without_its_end_of_turn(models: tuple[Any, Any], tokens: ChatTokens) -> None:
    found = compared(models, tokens)
    assert found.prompts == [PROMPT] * 3
    for samples in (found.policy, found.reference):
        assert all("<|" not in text for text in samples.completions)
        assert samples.rewards == [len(text) / 1000 for text in samples.completions]
        assert samples.desirable == ["thanks" in text for text in samples.completions]


def test_only_the_policy_is_conditioned_on_desirable(
    models: tuple[Any, Any], tokens: ChatTokens, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {}
    sample = comparison.sample  # type: ignore[attr-defined]

    def watch(model: Any, prompts: list[list[int]], **options: Any) -> list[list[int]]:
        asked["policy" if model is models[0] else "reference"] = prompts
        return sample(model, prompts, **options)

    monkeypatch.setattr(comparison, "sample", watch)
    found = compared(models, tokens, control=lambda desirable: GOOD if desirable else "wrong")
    plain = tokens.prompt(PROMPT)
    assert asked["reference"] == [plain] * 3
    assert asked["policy"] == [[*plain, tokens.tokenizer.convert_tokens_to_ids(GOOD)]] * 3
    assert found.kl != 0


def test_the_summary_has_shares_rewards_and_kl() -> None:
    before = Samples(["a", "b"], [0.0, 0.5], [False, False])
    after = Samples(["c", "d"], [1.0, 0.5], [True, False])
    assert Comparison(["p", "q"], before, after, 1.5).summary() == {
        "reference_desirable": 0.0,
        "policy_desirable": 0.5,
        "reference_reward": 0.25,
        "policy_reward": 0.75,
        "kl": 1.5,
    }
