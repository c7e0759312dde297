"""KL and its error from sampled replies, against enumeration and simulation on a vocabulary of five tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from halos.sampling.choice import uniform_draws
from halos.sampling.generate import sample
from halos.sampling.replies import Reply, reply_metrics
from halos.sampling.scoring import score
from tests.sampling.test_scoring import END, LONGEST, PROMPT, everything, log_prob
from tests.tiny import model

SIMULATIONS, REPLIES = 400, 64


@pytest.fixture(scope="module")
def models() -> tuple[Any, Any]:
    return tuple(model("llama", vocab_size=5, seed=seed).eval() for seed in (0, 1))


def measured(models: tuple[Any, Any], count: int, seed: int) -> list[Reply]:
    """Replies to one prompt with their divergences, as a validation of a run draws and scores them."""
    prompts = [PROMPT] * count
    draws = uniform_draws(count, LONGEST, seed=seed)
    drawn = sample(models[0], prompts, end_of_turn=END, pad=0, max_new_tokens=LONGEST, draws=draws, batch_size=count)
    scores = score(*models, prompts, prompts, drawn, batch_size=512)
    replies = zip(drawn, scores.divergence.tolist(), strict=True)
    return [Reply(n, ids, ids[-1] != END, divergence) for n, (ids, divergence) in enumerate(replies)]


@pytest.mark.long
def test_kl_equals_enumeration_and_its_error_bars_cover_at_their_rate(models: tuple[Any, Any]) -> None:
    p, q = (np.array([log_prob(one, y) for y in everything()]) for one in models)
    exact, length = float(np.exp(p) @ (p - q)), float(np.exp(p) @ [len(y) for y in everything()])
    replies = measured(models, SIMULATIONS * REPLIES, seed=1)
    found = reply_metrics(replies)
    assert found["kl"] == pytest.approx(exact, abs=4 * found["kl_error"])
    assert found["kl_error"] < 0.02 * exact
    assert found["kl_per_token"] == pytest.approx(exact / length, rel=0.02)
    assert found["samples/length"] == pytest.approx(length, rel=0.02)
    cut = float(np.exp(p) @ [y[-1] != END for y in everything()])
    assert found["samples/truncated"] == pytest.approx(cut, abs=0.02)
    # Of validations with 64 replies each, 68.3 % lie within one error of the KL, and 95.4 % within two.
    each = [reply_metrics(replies[n * REPLIES : (n + 1) * REPLIES]) for n in range(SIMULATIONS)]
    distances = np.array([abs(one["kl"] - exact) / one["kl_error"] for one in each])
    for errors, rate in ((1, 0.6827), (2, 0.9545)):
        tolerance = 3.3 * (rate * (1 - rate) / SIMULATIONS) ** 0.5
        assert np.mean(distances < errors) == pytest.approx(rate, abs=tolerance)


def test_metrics_by_hand() -> None:
    replies = [Reply(0, [5, 1], False, 0.5), Reply(1, [5, 6, 7, 8], True, 2.5)]
    assert reply_metrics(replies) == {
        "samples/length": 3.0,
        "samples/truncated": 0.5,
        "kl": 1.5,
        "kl_per_token": 0.5,
        "kl_error": pytest.approx(1.0),  # deviation √2, over √2
    }
    assert "kl_error" not in reply_metrics(replies[:1])
    assert reply_metrics([Reply(0, [1], False)]) == {"samples/length": 1.0, "samples/truncated": 0.0}
