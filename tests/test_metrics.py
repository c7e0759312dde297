"""Metrics: sums and counts are added up before they are divided, and AUC counts pairs."""

import math
from itertools import product
from typing import Any

import pytest
import torch
import torch.distributed as dist

from halos.loop.output import Output
from halos.metrics import Averages, LabelledRewards, Mean, StepAverages, auc, mean_where
from tests.fork import run_ranks


def averages(*updates: dict[str, Mean]) -> Averages:
    metric = Averages()
    for means in updates:
        metric.update(means)
    return metric


def tensor_mean(values: list[float]) -> Mean:
    return Mean(torch.tensor(values).sum(), len(values))


def test_uneven_micro_batches_give_the_mean_of_all_not_of_the_means() -> None:
    metric = averages({"x": tensor_mean([1.0, 2.0, 3.0])}, {"x": tensor_mean([10.0])})
    assert metric.compute() == {"x": 4.0}  # the mean of the means would be 6


def test_each_name_has_its_own_count() -> None:
    first = {"x": Mean(torch.tensor(6.0), 3), "y": Mean(torch.tensor(1.0), torch.tensor(4))}
    second = {"x": Mean(torch.tensor(0.0), 1), "y": Mean(torch.tensor(1.0), torch.tensor(0))}
    assert averages(first, second).compute() == {"x": 1.5, "y": 0.5}


def test_a_name_that_counted_nothing_is_left_out() -> None:
    empty, one = Mean(torch.tensor(0.0), torch.tensor(0)), Mean(torch.tensor(2.0), 1)
    assert averages({"x": empty, "y": one}).compute() == {"y": 2.0}
    assert averages({"x": empty, "y": one}, {"x": one, "y": one}).compute() == {"x": 2.0, "y": 2.0}


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_nothing_seen_is_nothing_said() -> None:
    assert Averages().compute() == {}


@pytest.mark.parametrize("names", [["x"], ["y", "x"], ["x", "y", "z"], ["x", "z"]])
def test_the_names_must_stay_the_same(names: list[str]) -> None:
    one = Mean(torch.tensor(1.0), 1)
    metric = averages({"x": one, "y": one})
    with pytest.raises(ValueError, match=r"expected the metrics \['x', 'y'\], found"):
        metric.update(dict.fromkeys(names, one))


def test_the_denominator_of_a_loss_step_is_not_the_metrics_count() -> None:
    assert averages({"x": Mean(torch.tensor(6.0), 2, step_count=100)}).compute() == {"x": 3.0}


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_a_reset_forgets_the_sums() -> None:
    metric = averages({"x": tensor_mean([100.0])})
    metric.reset()
    assert metric.compute() == {}
    metric.update({"x": tensor_mean([1.0])})
    assert metric.compute() == {"x": 1.0}


def test_each_step_has_averages_of_its_own() -> None:
    metric = StepAverages()
    for step in ([[1.0, 2.0, 3.0], [10.0]], [[5.0]], [[0.5], [1.5]]):
        for micro_batch in step:
            metric.update({"x": tensor_mean(micro_batch), "y": Mean(torch.tensor(0.0), len(micro_batch) - 1)})
        metric.end_step()
    assert metric.compute() == [{"x": 4.0, "y": 0.0}, {"x": 5.0}, {"x": 1.0}]


def test_a_step_that_begins_behind_a_reset_is_not_added_to_the_last() -> None:
    metric = StepAverages()
    metric.update({"x": tensor_mean([100.0])})
    metric.reset()
    metric.update({"x": tensor_mean([1.0])})
    metric.update({"x": tensor_mean([2.0])})
    assert metric.compute() == [{"x": 1.5}]


def _steps_of_a_rank() -> list[dict[str, float]]:
    dist.init_process_group("gloo")
    metric, rank = StepAverages(), dist.get_rank()
    for step in range(3):
        metric.update({"x": Mean(torch.tensor(1.0 + step + rank), 1 + rank)})
        metric.end_step()
    return metric.compute()


@pytest.mark.ranks
def test_steps_are_summed_over_ranks_all_at_once() -> None:
    expected = [{"x": (1 + step + 2 + step) / 3} for step in range(3)]
    assert run_ranks(_steps_of_a_rank) == [expected, expected]


def test_many_small_numbers_keep_their_precision() -> None:
    metric = Averages()
    for _ in range(1000):
        metric.update({"x": Mean(torch.tensor(0.1, dtype=torch.float64), 1)})
    metric.update({"x": Mean(torch.tensor(1e6, dtype=torch.float64), 1)})
    assert metric.compute()["x"] == pytest.approx((1e6 + 100) / 1001, rel=1e-12)


def test_updates_keep_no_graph() -> None:
    weight = torch.ones(2, requires_grad=True)
    assert not averages({"x": Mean(weight.sum(), 2)}).sums.requires_grad


def test_a_non_finite_value_is_not_hidden() -> None:
    metric = averages({"x": tensor_mean([1.0])}, {"x": tensor_mean([math.nan])})
    assert math.isnan(metric.compute()["x"])


def test_the_mean_over_places() -> None:
    values = torch.tensor([[1.0, 2.0], [3.0, 4.0]], requires_grad=True)
    mean = mean_where(values, torch.tensor([[True, False], [True, True]]))
    assert (float(mean.total), int(mean.count)) == (8.0, 3)
    assert not mean.total.requires_grad


# AUC


def brute_force(rewards: list[float], labels: list[bool]) -> float:
    good = [r for r, label in zip(rewards, labels, strict=True) if label]
    bad = [r for r, label in zip(rewards, labels, strict=True) if not label]
    return sum((g > b) + 0.5 * (g == b) for g, b in product(good, bad)) / (len(good) * len(bad))


def test_rewards_that_differ_by_rounding_are_ties() -> None:
    labels = torch.tensor([True, True, False, False])
    assert auc(torch.tensor([2e-5, 1e-5, 0.0, -2e-5]), labels) == 0.5
    assert auc(torch.tensor([2e-3, 1e-3, 0.0, -2e-3]), labels) == 1.0


@pytest.mark.parametrize("scale", [1e-3, 0.1, 1.0, 1e3, -1e6])
@pytest.mark.parametrize("levels", [2, 5, 1000])
@pytest.mark.parametrize("seed", range(3))
def test_auc_counts_pairs_with_ties_as_half(scale: float, levels: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    rewards = (torch.randint(levels, (60,), generator=generator) - levels // 2).float() * scale
    labels = torch.rand(60, generator=generator) < 0.3
    expected = brute_force(rewards.tolist(), labels.tolist())
    assert auc(rewards, labels) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("rewards", "labels", "expected"),
    [
        ([2.0, 1.0], [True, False], 1.0),
        ([1.0, 2.0], [True, False], 0.0),
        ([7.0, 7.0], [True, False], 0.5),
        ([100.0, 101.0, 102.0], [False, True, True], 1.0),  # a sigmoid would call these equal
        ([1.0, 2.0, 3.0, 2.0], [False, False, True, True], 0.875),
    ],
)
def test_auc_by_hand(rewards: list[float], labels: list[bool], expected: float) -> None:
    assert auc(torch.tensor(rewards), torch.tensor(labels)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("labels", [[True, True], [False, False], []])
def test_one_class_has_no_auc(labels: list[bool]) -> None:
    assert auc(torch.arange(len(labels)).float(), torch.tensor(labels, dtype=torch.bool)) is None


def test_labelled_rewards_are_collected_in_float32() -> None:
    metric = LabelledRewards()
    metric.update(torch.tensor([1.0, 2.0], dtype=torch.bfloat16, requires_grad=True), torch.tensor([True, False]))
    metric.update(torch.tensor([3.0], dtype=torch.bfloat16), torch.tensor([True]))
    metric.update(torch.tensor([4.0]), torch.tensor([False]), torch.tensor([0.5]))
    rewards, labels, weights = metric.compute()
    assert rewards.dtype == torch.float32
    assert rewards.tolist() == [1.0, 2.0, 3.0, 4.0]
    assert labels.tolist() == [True, False, True, False]
    assert weights.tolist() == [1.0, 1.0, 1.0, 0.5]
    metric.reset()
    assert metric.rewards == []


def test_counts_that_are_plain_numbers_are_not_rounded_where_bfloat16_is_the_default() -> None:
    averages = Averages()
    torch.set_default_dtype(torch.bfloat16)
    try:
        averages.update({"a": Mean(torch.tensor(514.0, dtype=torch.float32), 257.0)})
    finally:
        torch.set_default_dtype(torch.float32)
    assert averages.compute() == {"a": pytest.approx(514 / 257, rel=1e-12)}


def test_a_scaled_mean_keeps_its_denominators() -> None:
    mean = Mean(torch.tensor(6.0), torch.tensor(2.0), 4.0)
    for scaled in (0.5 * mean, mean * 0.5, mean * torch.tensor(0.5)):
        assert (float(scaled.total), float(scaled.count), scaled.step_count) == (3.0, 2.0, 4.0)


@pytest.mark.parametrize("value", [torch.tensor(1.0), 1.0])
def test_a_term_without_a_denominator_is_refused(value: Any) -> None:
    with pytest.raises(
        ValueError, match=r"^Output.loss\['hinge'\]: expected a mean made with per_example or per_token"
    ):
        Output({"hinge": value})
    with pytest.raises(ValueError, match=r"^Output.metrics\['size'\]: expected a mean made with halos.metrics.Mean"):
        Output({}, metrics={"size": value})
