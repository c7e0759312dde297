"""Intervals cover at their nominal rate; tests and quantiles against exact values."""

import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from halos.evaluation.statistics import Bootstrap, Estimate, over_seeds, sign_flip_p

Draw = Callable[[np.random.Generator], tuple[Sequence[float], Sequence[int]]]


def coverage(draw: Draw, truth: float, level: float, times: int = 300) -> float:
    inside = 0
    for n in range(times):
        values, groups = draw(np.random.default_rng(n))
        estimate = Bootstrap(resamples=200, level=level, seed=n).mean(values, groups)
        assert estimate.low is not None
        assert estimate.high is not None
        inside += estimate.low <= truth <= estimate.high
    return inside / times


@pytest.mark.long
@pytest.mark.parametrize("level", [0.95, 0.8])
def test_bootstrap_intervals_of_a_rate_cover_at_their_nominal_rate(level: float) -> None:
    share = coverage(lambda r: ((r.random(100) < 0.3).astype(float).tolist(), range(100)), 0.3, level)
    assert share == pytest.approx(level, abs=3.3 * (level * (1 - level) / 300) ** 0.5 + 0.01)


def correlated(random: np.random.Generator) -> tuple[list[float], list[int]]:
    """60 prompts with four completions each, which share most of their value."""
    values = np.repeat(random.normal(size=60), 4) + 0.3 * random.normal(size=240)
    return list(values), [n // 4 for n in range(240)]


@pytest.mark.long
def test_intervals_cover_where_completions_of_a_prompt_are_correlated() -> None:
    assert coverage(correlated, 0.0, 0.95, times=150) == pytest.approx(0.95, abs=0.05)
    # Resampling single completions would give intervals that are far too narrow.
    assert coverage(lambda r: (correlated(r)[0], range(240)), 0.0, 0.95, times=60) < 0.8


def test_the_interval_of_a_mean_is_near_the_normal_one() -> None:
    values = list(np.random.default_rng(0).normal(5, 2, size=400))
    estimate, error = Bootstrap(resamples=4000).mean(values, range(400)), np.std(values) / 20
    assert estimate.value == pytest.approx(np.mean(values))
    assert (estimate.low, estimate.high) == pytest.approx(
        (estimate.value - 1.96 * error, estimate.value + 1.96 * error), abs=0.1 * error
    )
    assert estimate.n == 400
    few = Bootstrap(resamples=50)
    assert few.mean(values, range(400)) == few.mean(values, range(400))


@pytest.mark.parametrize(("n", "level"), [(10, 0.95), (3, 0.95), (40, 0.8)])
def test_a_rate_of_one_does_not_claim_certainty(n: int, level: float) -> None:
    # Clopper-Pearson: the lowest p at which n of n successes still have the probability (1 − level) / 2.
    bound = ((1 - level) / 2) ** (1 / n)
    bootstrap = Bootstrap(level=level)
    for value, expected in ((1.0, (bound, 1.0)), (0.0, (0.0, 1 - bound))):
        estimate = bootstrap.rate([value] * n, range(n))
        assert (estimate.low, estimate.high) == pytest.approx(expected, abs=1e-9)
        assert (estimate.value, estimate.n) == (value, n)


def test_the_exact_interval_counts_prompts_not_completions_and_is_for_extreme_rates_only() -> None:
    bootstrap = Bootstrap(resamples=50)
    assert bootstrap.rate([1.0] * 40, [n // 4 for n in range(40)]).low == pytest.approx(0.025**0.1)
    assert bootstrap.rate([1.0, 0.0] * 20, range(40)) == bootstrap.mean([1.0, 0.0] * 20, range(40))
    assert bootstrap.rate([0.5] * 4, range(4)) == Estimate(0.5, 0.5, 0.5, 4)


def test_ratio_and_correlation_have_the_values_of_numpy() -> None:
    x, y = np.random.default_rng(1).normal(size=(2, 50))
    assert Bootstrap().ratio(x, [2.0] * 50, range(50)).value == pytest.approx(x.mean() / 2)
    assert Bootstrap().correlation(x, y, range(50)).value == pytest.approx(np.corrcoef(x, y)[0, 1])


def test_what_is_not_defined_has_no_interval() -> None:
    constant = Bootstrap().correlation([1.0] * 5, range(5), range(5))
    assert constant.as_json() == {"value": None, "low": None, "high": None, "n": 5}
    assert Bootstrap().mean([1.0, 2.0], [0, 0]) == Estimate(1.5, None, None, 1)
    assert Bootstrap(resamples=20).interval(lambda i: float("nan"), range(9)).low is None


def enumerated_p(differences: Sequence[float]) -> float:
    """The share of all sign patterns whose sum is as far from 0 as the observed one, pattern by pattern."""
    sums = [
        abs(math.fsum(s * d for s, d in zip(signs, differences, strict=True)))
        for signs in itertools.product((1, -1), repeat=len(differences))
    ]
    return sum(s >= abs(math.fsum(differences)) - 1e-9 for s in sums) / len(sums)


def test_sign_flips_are_exact_for_few_differences() -> None:
    few = [0.5, 1.0, -0.2, 2.0, 0.4]
    assert sign_flip_p(few) == enumerated_p(few) == 4 / 32
    for seed in range(20):
        # Halves, as verdicts give them: many patterns tie with the observed sum.
        ties = np.round(np.random.default_rng(seed).normal(0.2, 0.5, size=2 + seed % 9) * 2) / 2
        assert sign_flip_p(ties) == pytest.approx(enumerated_p(list(ties)), abs=1e-12)
    assert sign_flip_p([0.0] * 5) == sign_flip_p([]) == sign_flip_p([0.3]) == 1.0


def test_sign_flips_are_near_exact_for_many_differences_and_never_zero() -> None:
    few = [0.5, 1.0, -0.2, 2.0, 0.4]
    assert sign_flip_p(few + [0.0] * 20) == pytest.approx(4 / 32, abs=0.015)
    assert sign_flip_p([0.5] * 40) == pytest.approx(1 / 10_001)  # none of 10,000 random patterns reaches the sum
    # Equal differences: the sum of signs is binomial. P(|wins − losses| ≥ 8) of 24 fair flips.
    exact = sum(math.comb(24, k) for k in range(25) if abs(2 * k - 24) >= 8) / 2**24
    assert sign_flip_p([1.0] * 16 + [-1.0] * 8) == pytest.approx(exact, abs=3.3 * (exact * (1 - exact) / 10_000) ** 0.5)
    many = [1.0, 0.5, -0.5, 2.0] * 6
    assert sign_flip_p(many, seed=1) == sign_flip_p(many, seed=1)


@pytest.mark.long
def test_sign_flip_p_values_are_uniform_without_a_difference() -> None:
    values = [sign_flip_p(np.random.default_rng(n).normal(size=10)) for n in range(400)]
    assert np.mean(np.array(values) <= 0.1) == pytest.approx(0.1, abs=0.05)


@pytest.mark.parametrize(("freedom", "quantile"), [(1, 12.7062), (2, 4.3027), (4, 2.7764), (9, 2.2622), (30, 2.0423)])
def test_seeds_have_students_interval_with_the_quantiles_of_the_tables(freedom: int, quantile: float) -> None:
    values = [float(n) for n in range(freedom + 1)]
    centre, error = np.mean(values), np.std(values, ddof=1) / len(values) ** 0.5
    estimate = over_seeds(values)
    assert estimate.value == pytest.approx(centre)
    assert estimate.low is not None
    assert estimate.high is not None
    assert (estimate.value - estimate.low) / error == pytest.approx(quantile, abs=1e-4)
    assert (estimate.high - estimate.value) / error == pytest.approx(quantile, abs=1e-4)


def test_one_seed_has_no_interval() -> None:
    assert over_seeds([1.0]) == Estimate(1.0, None, None, 1)
