"""Intervals cover at their nominal rate; tests and quantiles against exact values."""

import itertools

import numpy as np
import pytest

from halos.evaluation.statistics import (
    Estimate,
    bootstrap,
    correlation,
    mean,
    over_seeds,
    rate,
    ratio,
    sign_flip_p,
    t_quantile,
)


def coverage(draw, truth: float, level: float, times: int = 300) -> float:  # type: ignore[no-untyped-def]
    inside = 0
    for n in range(times):
        values, groups = draw(np.random.default_rng(n))
        found = mean(values, groups, resamples=200, level=level, seed=n)
        assert found.low is not None
        assert found.high is not None
        inside += found.low <= truth <= found.high
    return inside / times


@pytest.mark.long
@pytest.mark.parametrize("level", [0.95, 0.8])
def test_bootstrap_intervals_of_a_rate_cover_at_their_nominal_rate(level: float) -> None:
    found = coverage(lambda r: ((r.random(100) < 0.3).astype(float), None), 0.3, level)
    assert found == pytest.approx(level, abs=3.3 * (level * (1 - level) / 300) ** 0.5 + 0.01)


def alike(random: np.random.Generator) -> tuple[list[float], list[int]]:
    """60 prompts with four completions each, which share most of their value."""
    values = np.repeat(random.normal(size=60), 4) + 0.3 * random.normal(size=240)
    return list(values), [n // 4 for n in range(240)]


@pytest.mark.long
def test_intervals_cover_where_completions_of_a_prompt_are_alike() -> None:
    assert coverage(alike, 0.0, 0.95, times=150) == pytest.approx(0.95, abs=0.05)
    # Completions drawn alone would claim far too much.
    assert coverage(lambda r: (alike(r)[0], None), 0.0, 0.95, times=60) < 0.8


def test_the_interval_of_a_mean_is_near_the_normal_one() -> None:
    values = list(np.random.default_rng(0).normal(5, 2, size=400))
    found, error = mean(values, resamples=4000), np.std(values) / 20
    assert found.value == pytest.approx(np.mean(values))
    assert (found.low, found.high) == pytest.approx(
        (found.value - 1.96 * error, found.value + 1.96 * error), abs=0.1 * error
    )
    assert found.n == 400
    assert mean(values, resamples=50) == mean(values, resamples=50)


def test_a_rate_of_one_does_not_claim_certainty() -> None:
    assert rate([1.0] * 10).low == pytest.approx(0.025**0.1)  # Clopper-Pearson: P(10 of 10) = 2.5 %
    assert rate([0.0] * 10).high == pytest.approx(1 - 0.025**0.1)
    assert rate([1.0, 0.0] * 20).low == mean([1.0, 0.0] * 20).low


def test_ratio_and_correlation_have_the_values_of_numpy() -> None:
    x, y = np.random.default_rng(1).normal(size=(2, 50))
    assert ratio(x, [2.0] * 50, range(50)).value == pytest.approx(x.mean() / 2)
    assert correlation(x, y, range(50)).value == pytest.approx(np.corrcoef(x, y)[0, 1])


def test_what_is_not_defined_has_no_interval() -> None:
    assert correlation([1.0] * 5, range(5), range(5)).as_json() == {"value": None, "low": None, "high": None, "n": 5}
    assert mean([1.0, 2.0], [0, 0]) == Estimate(1.5, None, None, 1)
    assert bootstrap(lambda i: float("nan"), range(9), resamples=20).low is None


def test_sign_flips_are_exact_for_few_differences_and_near_it_for_many() -> None:
    few = [0.5, 1.0, -0.2, 2.0, 0.4]
    sums = [abs(sum(s * d for s, d in zip(signs, few, strict=True))) for signs in itertools.product((1, -1), repeat=5)]
    assert sign_flip_p(few) == np.mean([s >= sum(few) - 1e-9 for s in sums]) == 4 / 32
    assert sign_flip_p(few + [0.0] * 20) == pytest.approx(4 / 32, abs=0.015)
    assert sign_flip_p([0.0] * 5) == sign_flip_p([]) == 1.0
    assert sign_flip_p([0.5] * 40) == pytest.approx(1e-4, rel=0.01)


def test_sign_flip_p_values_are_uniform_without_a_difference() -> None:
    found = [sign_flip_p(np.random.default_rng(n).normal(size=10)) for n in range(400)]
    assert np.mean(np.array(found) <= 0.1) == pytest.approx(0.1, abs=0.05)


@pytest.mark.parametrize(("freedom", "value"), [(1, 12.7062), (2, 4.3027), (4, 2.7764), (9, 2.2622), (30, 2.0423)])
def test_t_quantiles_are_those_of_the_tables(freedom: int, value: float) -> None:
    assert t_quantile(0.975, freedom) == pytest.approx(value, abs=1e-4)


def test_seeds_have_students_interval() -> None:
    found = over_seeds([1.0, 2.0, 3.0])
    reach = 4.302653 / 3**0.5
    assert (found.low, found.value, found.high) == pytest.approx((2 - reach, 2, 2 + reach), abs=1e-5)
    assert over_seeds([1.0]) == Estimate(1.0, None, None, 1)
