"""What a run prints of a loss that is a formula."""

from __future__ import annotations

import pytest

from halos.commands.builders import objective_maker
from halos.commands.value_report import show_value
from halos.objectives.halo import HALO
from tests.configs import compose

KT = "where(u>0, u**0.88, -2.25*(-u)**0.88)"


def shown(capsys: pytest.CaptureFixture[str], *words: str) -> list[str]:
    node = compose(*words).loss
    objective = objective_maker(node)()
    assert isinstance(objective, HALO)
    show_value(objective, node)
    return capsys.readouterr().out.splitlines()


def test_a_formula_as_it_is_typed(capsys: pytest.CaptureFixture[str]) -> None:
    lines = shown(capsys, "loss=halo", f"loss.value='{KT}'", "loss.undesirable_weight=0.5")
    # By hand: 0.88 · 5^−0.12 = 0.7254, 2.25 times that 1.632, and at 0 2.25 · 1.12 · 0.001^−0.12.
    assert lines == [
        "loss        −λ_y v(±u), + for desirable y",
        "value       v(u) = where(u>0, u^0.88, −2.25·(−u)^0.88)",
        "gain        u = r − z₀, z₀ by loss.reference_point=mismatched, r = log π_θ(y|x) − log π_ref(y|x)",
        "smoothing   powers below 1 are parabolas within ε = 0.001 of 0",
        "definition  HALO, with reward log π_θ/π_ref",
        "gradient    weight at u = −5, −1, 0, 1, 5 nats",
        "            1.632, 1.98, 5.773, 0.88, 0.7254 (desirable)",
        "            0.3627, 0.44, 2.886, 0.99, 0.8161 (undesirable)",
        "",
    ]


def test_pairs_scores_and_why_it_is_no_halo(capsys: pytest.CaptureFixture[str]) -> None:
    lines = shown(capsys, "loss=halo_dpo", "loss.value='-(u - 1/(2*beta))**2'", "loss.reward=mean_log_ratio")
    assert lines[:3] == [
        "loss        −v(u)",
        "value       v(u) = −(u − 1/(2·β))^2, β = 0.1",
        "gain        u = r_w − r_l, r = (log π_θ(y|x) − log π_ref(y|x)) / tokens of y",
    ]
    assert lines[3] == "smoothing   none is needed"
    assert lines[4] == "definition  not a HALO: desirable completions: the value decreases at a gain of 5.25"
    assert lines[6] == "            20, 12, 10, 8, 0 (chosen)"
    lines = shown(capsys, "loss=halo", "loss.value=logistic", "loss.view=scored", "loss.beta=0.4")
    assert lines[0] == "loss        |s − τ| λ_y (1 − v(±u)), + for s > τ"
    assert lines[1] == "value       v(u) = σ(β·u), β = 0.4"


def test_a_value_without_a_slope_at_0_is_said_so(capsys: pytest.CaptureFixture[str]) -> None:
    lines = shown(capsys, "loss=halo", "loss.value='relu(u)'")
    assert "            0, 0, 0, 1, 1 (desirable)" in lines
    assert (
        "            0 at u = 0, where a policy that equals its reference starts: it never moves (desirable)" in lines
    )


def test_labels_that_may_be_wrong_push_less(capsys: pytest.CaptureFixture[str]) -> None:
    lines = shown(capsys, "loss=halo", "loss.value=linear", "loss.noise=0.2")
    assert lines[0] == (
        "loss        −λ_y v(±u), + for desirable y; 0.8 of it, and 0.2 of the loss of the opposite label"
    )
    assert lines[6:8] == [
        "            0.06, 0.06, 0.06, 0.06, 0.06 (desirable)",
        "            0.06, 0.06, 0.06, 0.06, 0.06 (undesirable)",
    ]
