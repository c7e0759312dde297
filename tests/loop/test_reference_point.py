"""The estimators of KTO's reference point z₀."""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from halos.data.batches.batch import Batch
from halos.data.batches.collate import collate
from halos.data.rows.token_rows import Row
from halos.loop.point_refresh import PointRefresh
from halos.loop.reference_point import REFERENCE_POINTS, PolicyKL, Running, reference_point
from halos.objectives import BCO, KTO, Humanline, Mix
from halos.policy.adapters import as_reference
from halos.policy.backbone import Backbone
from halos.policy.logprobs.completions import LogProbs
from halos.policy.lora import LoRA
from halos.testing import check_objective
from tests import tiny
from tests.fork import run_ranks
from tests.loop_runs import Run, assert_same, batch_of, fit, objective_of, rows_for
from tests.train_runs import run

RATIOS = [1.0, -2.0, 4.0, 0.5, 3.0]
GROUPS = [0, 0, 1, 0, 1]
WEIGHTS = [1.0, 2.0, 0.5, 3.0, 1.0]


def doubles(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def estimate(name: str, *, ids: str = "abcde", weights: list[float] | None = None, **options: Any) -> Any:
    """(z₀, its metrics) of RATIOS in GROUPS, which are those of y' too where the estimator reads y'."""
    point = reference_point(name, **options).double()
    branches = 1 + point.needs.mismatched
    rows = [
        Row(one, group, (1,), ((5,), (6,))[:branches], desirable=True, weight=weight)
        for one, group, weight in zip(ids, GROUPS, weights or [1.0] * 5, strict=True)
    ]
    batch = collate(rows, mismatched=point.needs.mismatched)
    tokens = doubles(RATIOS)[:, None, None].expand(-1, branches, -1).clone().requires_grad_()
    logprobs = LogProbs(tokens - 7, batch.mask, divergence=doubles(RATIOS).abs()[:, None, None])
    z0, metrics = point(batch, logprobs, torch.full((5, branches), -7.0, dtype=torch.float64))
    assert not z0.requires_grad
    return z0, {name: float(mean.total / mean.count) for name, mean in metrics.items()}


@pytest.mark.parametrize(
    ("name", "weights", "expected"),
    [
        ("zero", None, 0.0),
        ("mismatched", None, 6.5 / 5),
        ("mismatched", WEIGHTS, (1 - 4 + 2 + 1.5 + 3) / 7.5),
        ("token", None, 10.5 / 5),
        ("token", WEIGHTS, (1 + 4 + 2 + 1.5 + 3) / 7.5),
        ("running", None, 0.0),  # there is no step before
        ("policy", None, 0.0),
    ],
)
def test_one_point_for_all_examples(name: str, weights: list[float] | None, expected: float) -> None:
    z0, metrics = estimate(name, weights=weights)
    assert float(z0) == pytest.approx(expected, abs=1e-14)
    assert metrics == ({} if name == "zero" else pytest.approx({"z0": expected, "z0/raw": expected}, abs=1e-14))


@pytest.mark.parametrize(
    ("ids", "weights", "raw"),
    [
        ("abcde", None, [(-2 + 0.5) / 2, (1 + 0.5) / 2, 3, (1 - 2) / 2, 4]),
        ("abcde", WEIGHTS, [(-4 + 1.5) / 5, (1 + 1.5) / 4, 3, (1 - 4) / 3, 4]),
        ("aacce", None, [0.5, 0.5, 3, (1 - 2) / 2, 4]),  # copies of an example are not among its others
        ("ccccc", None, [0, 0, 0, 0, 0]),  # and without others z₀ is 0
    ],
)
def test_the_point_of_a_prompt_is_the_mean_of_its_other_completions(
    ids: str, weights: list[float] | None, raw: list[float]
) -> None:
    z0, metrics = estimate("per_prompt", ids=ids, weights=weights, clamp=False)
    torch.testing.assert_close(z0, doubles(raw), rtol=0, atol=1e-14)
    clamped, metrics = estimate("per_prompt", ids=ids, weights=weights)
    torch.testing.assert_close(clamped, doubles(raw).clamp(min=0), rtol=0, atol=1e-14)
    share = doubles(weights or [1.0] * 5)
    means = {"z0": float(share @ clamped / share.sum()), "z0/raw": float(share @ z0 / share.sum())}
    assert metrics == pytest.approx(means, abs=1e-14)


@pytest.mark.parametrize("clamp", [True, False])
def test_the_clamp_is_a_parameter_of_the_loss(clamp: bool) -> None:
    objective = KTO(clamp_reference_point=clamp)
    batch = batch_of(KTO, rows_for(KTO, 3))
    below = LogProbs(torch.full(batch.mask.shape, -2.0) * batch.mask, batch.mask)
    output = objective.compute(batch, below, LogProbs(torch.zeros(batch.mask.shape), batch.mask))
    raw = -2.0 * float(batch.mask[:, 1].sum()) / 3
    found = {name: float(mean.total / mean.count) for name, mean in output.metrics.items()}
    assert found == pytest.approx({"z0": 0.0 if clamp else raw, "z0/raw": raw}, rel=1e-6)


# Running


def sums_of(objective: Any) -> Tensor:
    sums: Tensor = objective.reference_point.sums
    return sums


def test_the_running_mean_is_over_the_last_steps_before_each() -> None:
    objective = partial(objective_of, KTO, moved=0.1, reference_point="running", clamp_reference_point=False)
    rows = rows_for(KTO, 10)
    steps = fit(objective(reference_point_steps=2), rows, batch_size=2).steps
    # What each step adds, from a run whose only change is that it logs the mean of its own y'.
    sums, counts = [], []
    for start in range(0, 10, 2):
        one = objective(reference_point_steps=2)
        fit(one, rows[: start + 2], batch_size=2)
        newest = sums_of(one)[1]
        sums.append(float(newest[0]))
        counts.append(float(newest[1]))
    assert counts == [2.0] * 5
    expected = [0.0, *(sum(sums[max(0, n - 2) : n]) / (2 * min(n, 2)) for n in range(1, 5))]
    assert min(map(abs, expected[1:])) > 0.01
    assert [step["train/z0"] for step in steps] == pytest.approx(expected, rel=1e-6)
    mismatched = fit(objective_of(KTO, moved=0.1, clamp_reference_point=False), rows[:2], batch_size=2).steps[0]
    assert sums[0] / 2 == pytest.approx(mismatched["train/z0"], rel=1e-6)


def test_humanlines_second_look_and_validation_do_not_count() -> None:
    objective = objective_of(KTO, moved=0.1, reference_point="running", humanline=Humanline())
    fit(objective, rows_for(KTO, 4), batch_size=4, val=rows_for(KTO, 3, seed=1))
    assert sums_of(objective)[:, 1].tolist() == [0.0, 4.0, *[0.0] * 31]


def test_a_step_that_is_not_finite_does_not_spoil_the_mean() -> None:
    point = Running(steps=2)
    point.sums[0] = torch.tensor([float("nan"), 2.0])
    point.end_step()
    assert point.sums.tolist() == [[0.0, 0.0]] * 3


def test_the_mean_stays_in_float32_in_a_model_of_half_precision() -> None:
    assert sums_of(KTO(reference_point="running").to(torch.bfloat16)).dtype == torch.float32


def test_the_parts_of_a_mixture_notice_the_end_of_a_step() -> None:
    mixture: Any = objective_of(
        Mix,
        parts={"one": partial(KTO, reference_point="running", reference_point_steps=1), "other": KTO},
        weights={"one": 1.0, "other": 1.0},
    )
    fit(mixture, rows_for(mixture, 4), batch_size=2)
    assert sums_of(mixture.parts["one"])[:, 1].tolist() == [0.0, 2.0]


def test_the_running_mean_does_not_depend_on_the_micro_batches() -> None:
    kind: Any = partial(objective_of, KTO, moved=0.1, reference_point="running", reference_point_steps=2)
    parts = fit(kind(), rows_for(KTO, 18), batch_size=2, accumulate_grad_batches=3)
    assert_same(parts, fit(kind(), rows_for(KTO, 18), batch_size=6))


# Samples of the policy


class Weights(PointRefresh):
    """Stands for the KL: how far the weights are from 0, which changes with each step."""

    def __init__(self) -> None:
        super().__init__()
        self.measured: dict[int, float] = {}

    def measure(self, trainer: Any, objective: Any) -> float:
        norm = float(sum(float(p.detach().square().sum()) for p in objective.trained.policy.parameters()))
        self.measured[trainer.global_step] = norm / 1000
        return norm / 1000


def test_the_point_of_samples_is_that_of_the_last_refresh() -> None:
    refresh = Weights()
    objective = objective_of(KTO, moved=0.1, reference_point="policy", reference_point_steps=2)
    options: dict[str, Any] = {"batch_size": 2, "accumulate_grad_batches": 3, "callbacks": [refresh]}
    steps = fit(objective, rows_for(objective, 30), val=rows_for(objective, 3, seed=1), **options).steps
    assert [*refresh.measured] == [0, 2, 4]
    assert len(set(refresh.measured.values())) == 3
    expected = [refresh.measured[n // 2 * 2] for n in range(5)]
    assert [step["train/z0"] for step in steps] == pytest.approx(expected, rel=1e-6)


def test_each_part_of_a_mixture_is_refreshed_at_its_own_steps() -> None:
    refresh = Weights()
    own: Any = {name: {"reference_point": "policy", "reference_point_steps": n} for name, n in (("two", 2), ("3", 3))}
    parts = {name: partial(KTO if name == "two" else BCO, **options) for name, options in own.items()}
    mixture: Any = objective_of(Mix, parts=parts, weights={"two": 1.0, "3": 1.0})
    fit(mixture, rows_for(mixture, 10), batch_size=2, callbacks=[refresh])
    assert [*refresh.measured] == [0, 2, 3, 4]
    found = [float(mixture.parts[name].reference_point.kl) for name in own]
    assert found == pytest.approx([refresh.measured[4], refresh.measured[3]], rel=1e-6)


def test_samples_need_a_callback_that_draws_them() -> None:
    objective = objective_of(KTO, reference_point="policy")
    with pytest.raises(ValueError, match=r"^loss\.reference_point=policy: expected a callback that samples the policy"):
        fit(objective, rows_for(objective, 2), batch_size=2)


# Ranks and resumed runs


def _train(name: str, **options: Any) -> Run:
    # The first rank's y' are longer, and prompts have three completions, of which a rank has one or two.
    rows = rows_for(KTO(reference_point=name), 12)
    val = rows_for(KTO(reference_point=name), 5, seed=1)
    objective = objective_of(KTO, moved=0.1, reference_point=name)
    return fit(objective, rows, val=val, callbacks=[Weights()], **options)


def _train_all() -> dict[str, Run]:
    return {name: _train(name, batch_size=2, ranks=2) for name in REFERENCE_POINTS}


@pytest.mark.slow
@pytest.mark.ranks
def test_two_ranks_equal_one_device() -> None:
    for found in run_ranks(_train_all):
        for name in REFERENCE_POINTS:
            one = _train(name, batch_size=4)
            assert_same(found[name], one)
            assert name == "zero" or any(step["train/z0"] > 0 for step in one.steps), name


# The divergence


@pytest.mark.parametrize("head_chunk", [None, 3])
def test_the_divergence_is_that_of_the_whole_distributions(head_chunk: int | None) -> None:
    objective = objective_of(KTO, moved=0.1, reference_point="token")
    objective.configure_model()
    backbone = objective.double().trained
    backbone.head_chunk = head_chunk
    rows = rows_for(objective, 3)
    batch = batch_of(objective, rows)
    policy, reference = backbone.logprobs(batch, with_hidden=True), backbone.reference_logprobs(batch, with_hidden=True)
    found = backbone.divergence(policy, reference)
    assert not found[~batch.mask].any()
    for number, row in enumerate(rows):
        ids = torch.tensor([[*row.prompt, *row.branches[0]]])
        start, stop = len(row.prompt) - 1, ids.shape[1] - 1
        p, q = (
            model(input_ids=ids).logits[0, start:stop].softmax(-1) for model in (backbone.policy, backbone.reference)
        )
        expected = (p * (p / q).log()).sum(-1).detach()
        torch.testing.assert_close(found[number, 0, : stop - start], expected, rtol=1e-9, atol=1e-12)
        assert (expected > 1e-3).all()
    output, metrics = objective.compute_batch(batch)
    total = found.sum() / 3
    assert float(metrics["z0"].total / metrics["z0"].count) == pytest.approx(float(total), rel=1e-12)
    assert output.rewards is not None


def test_at_step_0_the_divergence_is_0() -> None:
    assert fit(objective_of(KTO, reference_point="token"), rows_for(KTO, 3), batch_size=3).steps[0]["train/z0"] == 0


def test_without_its_adapter_the_policy_is_the_reference() -> None:
    model = tiny.model()
    LoRA(enabled=True).attach(model, base="x")
    backbone = Backbone(model, with_reference=False, adapter_reference=True).double()
    batch = collate(rows_for(KTO(reference_point="token"), 3))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    policy, reference = backbone.logprobs(batch, with_hidden=True), backbone.reference_logprobs(batch, with_hidden=True)
    found = backbone.divergence(policy, reference)
    whole = _whole_divergence(backbone, batch)
    assert float(found.sum()) == pytest.approx(whole, rel=1e-6)
    assert whole > 1e-3


@torch.no_grad()
def _whole_divergence(backbone: Backbone, batch: Batch) -> float:
    total = 0.0
    for chunk in batch.chunks:
        p = backbone.policy(input_ids=chunk.input_ids).logits.flatten(0, 1)[chunk.predicts].double().log_softmax(-1)
        with as_reference(backbone.policy):
            q = backbone.policy(input_ids=chunk.input_ids).logits.flatten(0, 1)[chunk.predicts].double().log_softmax(-1)
        total += float((p.exp() * (p - q)).sum())
    return total


# Refusals


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        (
            {"reference_point_steps": 4},
            "loss.reference_point_steps: expected null with loss.reference_point=mismatched, found 4; only running "
            "and policy count steps",
        ),
        (
            {"reference_point": "running", "reference_point_steps": 0},
            "loss.reference_point_steps: expected a whole number from 1 on, found 0",
        ),
    ],
)
def test_parameters_without_a_meaning_are_refused(parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        KTO(**parameters)


@pytest.mark.parametrize("name", sorted(set(REFERENCE_POINTS) - {"mismatched"}))
def test_without_a_reference_only_mismatched_completions_cancel_what_is_missing(name: str) -> None:
    with pytest.raises(ValueError, match=rf"^loss\.reference_point: expected mismatched .* found '{name}'"):
        KTO(reference_point=name, reference_free=True)


def test_a_kept_model_is_needed_to_compare_distributions() -> None:
    objective = KTO(Backbone(tiny.model(), with_reference=False), reference_point="token")
    with pytest.raises(ValueError, match=r"^model\.reference: expected live \(or adapter with LoRA\)"):
        fit(objective, rows_for(KTO(reference_point="token"), 2), batch_size=2)


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (("model.reference=cached",), "model.reference"),
        (("model.reference_path=x",), "model.reference_path"),
        (("strategy=fsdp",), "strategy.name"),
    ],
)
def test_runs_that_cannot_compare_distributions_are_refused(words: tuple[str, ...], key: str, tmp_path: Any) -> None:
    with pytest.raises(ValueError, match=rf"^{re.escape(key)}: expected .*loss\.reference_point=token"):
        run(tmp_path, "loss.reference_point=token", *words)


# Conformance


class MovedKTO(KTO):
    """KTO whose samples have moved, as the kit draws none."""

    def __init__(self, backbone: Any = None, **options: Any) -> None:
        super().__init__(backbone, reference_point="policy", **options)
        assert isinstance(self.reference_point, PolicyKL)
        self.reference_point.refresh(0.7)


@pytest.mark.long
def test_the_point_of_samples_keeps_every_promise() -> None:
    check_objective(MovedKTO)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mismatched", "running", "per_prompt", "token"])
def test_bco_with_each_estimator_keeps_every_promise(name: str) -> None:
    check_objective(partial(BCO, reference_point=name))


@pytest.mark.parametrize(
    "parameters",
    [
        {"reference_point": "running"},
        pytest.param({"reference_point": "per_prompt"}, marks=pytest.mark.slow),
        pytest.param({"reference_point": "token"}, marks=pytest.mark.slow),
        pytest.param({"clamp_reference_point": False}, marks=pytest.mark.slow),
    ],
)
@pytest.mark.long
def test_every_estimator_keeps_every_promise(parameters: dict[str, Any]) -> None:
    check_objective(partial(KTO, **parameters))
