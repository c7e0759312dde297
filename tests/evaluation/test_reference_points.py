"""The measurement of reference points: the numbers of each estimator by another way to compute them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from halos.data.rows.token_rows import Row
from halos.evaluation import point_report
from halos.evaluation.reference_points import BranchScores, Measured, Replies, Simulation, _points, measure, score_rows
from halos.evaluation.statistics import Estimate
from halos.sampling.scoring import score
from tests import tiny

GENERATOR = torch.Generator().manual_seed(0)
COUNT, KL = 40, 1.5
ROWS = [Row(f"row {n}", n // 2, (1,), ((2,), (3,))) for n in range(COUNT)]
SCORED = BranchScores(
    torch.randn(COUNT, 2, generator=GENERATOR, dtype=torch.float64) - 0.2,
    torch.rand(COUNT, 2, generator=GENERATOR, dtype=torch.float64),
    policy_seconds=8.0,
    reference_seconds=4.0,
    divergence_seconds=2.0,
)
REPLIES = Replies(torch.rand(50, generator=GENERATOR, dtype=torch.float64), seconds=10.0)


@pytest.fixture(scope="module")
def measured() -> dict[str, Measured]:
    # 100 steps of 8 are 20 whole passes over the rows.
    simulation = Simulation(steps=100, batch_size=8, point_steps=5, refresh_size=4)
    return {one.name: one for one in measure(SCORED, ROWS, REPLIES, KL, simulation)}


def test_means_over_whole_passes_are_those_of_the_data(measured: dict[str, Measured]) -> None:
    others = SCORED.ratios[:, 0].view(-1, 2).flip(1).flatten()
    expected = {
        "zero": torch.zeros(1),
        "mismatched": SCORED.ratios[:, 1],
        "per_prompt": others,
        "token": SCORED.divergence[:, 0],
    }
    assert set(measured) == {*expected, "running", "policy"}
    for name, values in expected.items():
        one = measured[name]
        assert one.raw == pytest.approx(float(values.mean()), abs=1e-12), name
        # The mean over a step is clamped; in these two the values themselves are, if any.
        if name in ("per_prompt", "token"):
            assert one.z0 == pytest.approx(float(values.clamp(min=0).mean()), abs=1e-12), name
        assert one.bias == one.z0 - KL
        assert one.error**2 == pytest.approx(one.bias**2 + one.deviation**2, rel=1e-9)


def test_the_spread_of_the_point_of_a_prompt_is_that_over_examples(measured: dict[str, Measured]) -> None:
    others = SCORED.ratios[:, 0].clamp(min=0)
    assert measured["per_prompt"].deviation == pytest.approx(float(others.std(correction=0)), rel=1e-9)
    assert measured["per_prompt"].positive == pytest.approx(float((others > 0).double().mean()), rel=1e-9)


def test_the_running_mean_is_measured_once_it_is_full(measured: dict[str, Measured]) -> None:
    each = _points("mismatched", SCORED, ROWS, Simulation(steps=105, batch_size=8), REPLIES).view(105, 8)[:, 0]
    expected = each.unfold(0, 5, 1)[:100].mean(1)
    assert measured["running"].raw == pytest.approx(float(expected.mean()), rel=1e-9)
    assert measured["running"].z0 == pytest.approx(float(expected.clamp(min=0).mean()), abs=1e-12)
    assert 0 <= measured["running"].deviation < measured["mismatched"].deviation


def test_refreshes_scatter_as_means_of_their_replies_do(measured: dict[str, Measured]) -> None:
    one, replies = measured["policy"], REPLIES.divergence
    error = float(replies.std(correction=0)) / 4**0.5
    # 100 refreshes: the mean within 4 of its errors, the deviation within about 4 times 7 %.
    assert one.z0 == one.raw == pytest.approx(float(replies.mean()), abs=4 * error / 10)
    assert one.deviation == pytest.approx(error, rel=0.3)
    assert one.positive == 1


def test_seconds_are_those_that_come_on_top(measured: dict[str, Measured]) -> None:
    found = {name: one.seconds for name, one in measured.items()}
    # Half of the branches, and 8 of 40 rows.
    expected = {"zero": 0, "mismatched": 8 / 10, "running": 8 / 10, "per_prompt": 0, "token": (4 + 2) / 10}
    # 4 of 50 replies every 5 steps.
    assert found == pytest.approx(expected | {"policy": 10 * 4 / 50 / 5})


def test_ratios_and_divergences_are_those_of_the_evaluation() -> None:
    policy, reference = tiny.model(seed=1), tiny.model(seed=2)
    rows = tiny.rows(5, branches=2)
    scored = score_rows(policy, reference, rows, batch_size=2)
    for branch in (0, 1):
        prompts, completions = [row.prompt for row in rows], [row.branches[branch] for row in rows]
        expected = score(policy, reference, prompts, prompts, completions)
        np.testing.assert_allclose(scored.ratios[:, branch], expected.log_ratios, atol=1e-4)
        np.testing.assert_allclose(scored.divergence[:, branch], expected.divergence, rtol=1e-4, atol=1e-5)


def test_the_table_has_a_line_for_each_and_the_figure_can_be_drawn(measured: dict[str, Measured]) -> None:
    kl = Estimate(KL, 1.4, 1.6, 100)
    lines = point_report.markdown([*measured.values()], kl, 8).splitlines()
    assert lines[0] == "KL = 1.500 nats per completion (95 % interval 1.400 to 1.600), 8 examples a step"
    assert [line.split("|")[1].strip() for line in lines[4:]] == [*measured]
    assert point_report.as_csv([*measured.values()]).count("\n") == 1 + len(measured)
    assert len(point_report.draw([*measured.values()], kl).axes) == 1
