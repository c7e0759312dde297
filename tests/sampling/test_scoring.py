"""KL, entropy and log-probs against exact enumeration of everything that a tiny model can say."""

import itertools
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from halos.sampling.generate import sample
from halos.sampling.scoring import Scores, score
from tests.tiny import model

VOCABULARY, LONGEST, END = 5, 4, 1
PROMPT = [2, 4, 3]


def everything() -> list[list[int]]:
    """Every completion up to LONGEST tokens: those that end with END, and those that the limit cuts."""
    others = [token for token in range(VOCABULARY) if token != END]
    ended = [[*start, END] for n in range(LONGEST) for start in itertools.product(others, repeat=n)]
    return ended + [list(start) for start in itertools.product(others, repeat=LONGEST)]


def log_prob(made: Any, completion: list[int]) -> float:
    """log π(y|x), token by token, one forward each: no batch, no padding, no shared code."""
    total = 0.0
    for n, token in enumerate(completion):
        logits = next_logits(made, tuple(completion[:n]))
        total += float(logits[token] - logits.exp().sum().log())
    return total


@cache
def next_logits(made: Any, start: tuple[int, ...]) -> torch.Tensor:
    with torch.no_grad():
        return made(input_ids=torch.tensor([[*PROMPT, *start]])).logits[0, -1].double()


@pytest.fixture(scope="module")
def models() -> tuple[Any, Any]:
    return tuple(model("llama", vocab_size=VOCABULARY, seed=seed).eval() for seed in (0, 1))


@pytest.fixture(scope="module")
def exact(models: tuple[Any, Any]) -> tuple[float, float]:
    """(KL of whole completions, tokens a completion) by enumeration."""
    p, q = ([log_prob(made, y) for y in everything()] for made in models)
    weights = np.exp(p)
    assert weights.sum() == pytest.approx(1, abs=1e-6)
    lengths = [len(y) for y in everything()]
    return float(weights @ (np.array(p) - np.array(q))), float(weights @ lengths)


def scores_of(models: Any, completions: list[list[int]], **options: Any) -> Scores:
    prompts = [PROMPT] * len(completions)
    policy, reference = models
    return score(policy, reference, prompts, prompts, completions, **options)


def test_tokens_that_are_not_scored_are_read(models: Any) -> None:
    completions = [[2, 4, 3, END], [3, END]]
    found = scores_of(models, completions, contexts=[[(1, 3)], []])
    one, other = completions
    last = log_prob(models[0], one) - log_prob(models[0], one[:3])
    assert found.logps == pytest.approx([log_prob(models[0], one[:1]) + last, log_prob(models[0], other)], abs=1e-4)
    assert found.tokens.tolist() == [2, 2]


def test_expected_kl_over_all_completions_is_the_exact_one_by_either_estimate(models: Any, exact: Any) -> None:
    found = scores_of(models, everything())
    weights = np.exp(found.logps)
    assert weights @ found.log_ratios == pytest.approx(exact[0], abs=1e-5)
    assert weights @ found.divergence == pytest.approx(exact[0], abs=1e-5)
    assert weights @ found.entropy == pytest.approx(-weights @ found.logps, abs=1e-5)  # chain rule
    assert weights @ found.tokens == pytest.approx(exact[1], abs=1e-6)


def test_sampled_kl_agrees_with_enumeration_per_completion_and_per_token(models: Any, exact: Any) -> None:
    drawn = sample(
        models[0], [PROMPT] * 4000, end_of_turn=END, pad=0, max_new_tokens=LONGEST, seed=3, batch_size=4000
    )  # fmt: skip
    found = scores_of(models, drawn, batch_size=1000)
    for estimates in (found.log_ratios, found.divergence):
        error = estimates.std() / len(drawn) ** 0.5
        assert abs(estimates.mean() - exact[0]) < 4 * error
        assert error < 0.05 * exact[0]
    assert found.divergence.std() < found.log_ratios.std()
    assert found.divergence.sum() / found.tokens.sum() == pytest.approx(exact[0] / exact[1], rel=0.1)


def test_log_probs_are_those_of_single_forwards_whatever_the_batch(models: Any) -> None:
    some = everything()[::37]
    found = scores_of(models, some, batch_size=3)
    assert found.logps == pytest.approx([log_prob(models[0], y) for y in some], abs=1e-5)
    assert found.reference == pytest.approx([log_prob(models[1], y) for y in some], abs=1e-5)


def test_prompts_may_differ_between_the_models(models: Any) -> None:
    y = [[3, 1]]
    policy, reference = models
    found = score(policy, reference, [[2, 4, 3, 4]], [PROMPT], y)
    assert found.reference == pytest.approx([log_prob(models[1], y[0])], abs=1e-5)
    assert found.logps != pytest.approx([log_prob(models[0], y[0])], abs=1e-3)


def test_without_a_reference_there_is_no_kl(models: Any) -> None:
    found = score(models[0], None, [PROMPT], [PROMPT], [[3, 1]])
    assert np.isnan(found.divergence).all()
    assert np.isfinite(found.entropy).all()


def test_other_vocabularies_and_empty_completions_are_refused(models: Any) -> None:
    other = model("llama", vocab_size=VOCABULARY + 1).eval()
    with pytest.raises(ValueError, match=r"reference: expected the policy's 5 tokens, found a vocabulary of 6"):
        score(models[0], other, [PROMPT], [PROMPT], [[1]])
    with pytest.raises(ValueError, match="completions: expected at least one token"):
        scores_of(models, [[]])
