"""Mixtures whose parts take several views: each part's loss is the one that it has alone, and so is its gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from halos.data.batches.batch import Batch
from halos.data.batches.collate import collate
from halos.data.batches.reference_table import ReferenceTable, entry_key
from halos.data.rows.joint_rows import by_view, joint_row
from halos.data.rows.token_rows import Row, ViewRows
from halos.objectives import BCO, DPO, GRPO, KTO, PPO, SFT, BCOPair, Humanline, Mix, Objective
from halos.testing import check_objective
from halos.testing.examples import loss_of, make_objective, tiny_rows
from tests.loop_runs import OBJECTIVES, assert_same, described, fit, objective_of
from tests.objectives.uneven_ranks import assert_ranks_equal_one

KTO_DPO: dict[str, Any] = {"parts": {"kto": KTO, "dpo": partial(DPO, beta=0.3)}, "weights": {"kto": 2.0, "dpo": 0.5}}
KTO_SFT: dict[str, Any] = {"parts": {"sft": SFT, "kto": KTO}, "weights": {"kto": 1.0, "sft": 0.25}}
THREE: dict[str, Any] = {
    "parts": {"dpo": DPO, "bco": BCO, "ppo": PPO, "sft": partial(SFT, average="completions")},
    "weights": {"dpo": 0.8, "bco": 0.4, "ppo": 0.3, "sft": 1.0},
}
MIXTURES = {"kto_dpo": KTO_DPO, "kto_sft": KTO_SFT, "three": THREE}
Gradients = dict[str, Tensor]


def made(parameters: dict[str, Any]) -> Objective:
    return make_objective(partial(Mix, **parameters), moved=True)


def uneven(objective: Objective) -> list[Row]:
    """Records of which some lack an example of a view, and one has two of each."""
    rows = tiny_rows(objective, 5)
    first = [ViewRows(view.view, view.rows * (view.view == "binary"), view.mismatched) for view in rows[0].views]
    both = [
        ViewRows(one.view, (*one.rows, *other.rows), one.mismatched)
        for one, other in zip(rows[2].views, rows[3].views, strict=True)
    ]
    kept = [joint_row(rows[0].id, 0, first)] if any(view.rows for view in first) else []
    return [*kept, rows[1], joint_row("both", rows[2].group, both), rows[4]]


def stepped(objective: Objective, batch: Batch) -> tuple[Tensor, Gradients]:
    """The loss, and the gradients of the policy."""
    loss = loss_of(objective.compute_batch(batch)[0])
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in objective.trained.policy.named_parameters() if p.grad is not None}


def alone(parameters: dict[str, Any], rows: Sequence[Row]) -> tuple[Tensor, Gradients]:
    """The weighted sum of the losses and gradients of the parts, each on a batch of its own view."""
    objective = made(parameters)
    names = [needs.view for needs in objective.data_needs().views]
    loss, gradients = torch.zeros((), dtype=torch.float64), Gradients()
    for name, kind in parameters["parts"].items():
        part = make_objective(kind, moved=True)
        view = names.index("pairs" if part.view == "demonstrations" and "pairs" in names else part.view)
        own = by_view(rows)[view]
        own_loss, own_gradients = stepped(part, collate(own, mismatched=part.needs.mismatched, chunks=2))
        weight = parameters["weights"][name]
        loss = loss + weight * own_loss
        gradients = {key: gradients.get(key, 0) + weight * value for key, value in own_gradients.items()}
    return loss, gradients


@pytest.mark.parametrize("name", MIXTURES)
@pytest.mark.parametrize("make_rows", [partial(tiny_rows, count=4), uneven])
def test_the_mixture_is_the_weighted_sum_of_its_parts_alone(name: str, make_rows: Callable[..., list[Row]]) -> None:
    parameters = MIXTURES[name]
    rows = make_rows(made(parameters))
    expected_loss, expected = alone(parameters, rows)
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    # transformers computes norms in float32 whatever the precision, so that other lengths of padding round otherwise.
    for packing, tolerance in ((False, 1e-12), (True, 1e-6)):
        loss, gradients = stepped(made(parameters), collate(rows, packing=packing, chunks=2))
        torch.testing.assert_close(loss, expected_loss, rtol=max(tolerance, 1e-7), atol=0)
        assert gradients.keys() == expected.keys()
        for key, gradient in gradients.items():
            torch.testing.assert_close(gradient / largest, expected[key] / largest, rtol=0, atol=max(tolerance, 1e-6))


@pytest.mark.parametrize(
    "name", ["kto_sft", *(pytest.param(name, marks=pytest.mark.slow) for name in ("kto_dpo", "three"))]
)
@pytest.mark.long
def test_a_mixture_of_views_conforms(name: str) -> None:
    check_objective(partial(Mix, **MIXTURES[name]))


@pytest.mark.parametrize("chunks", [1, 3])
def test_parts_read_the_log_probs_of_one_forward(chunks: int) -> None:
    """In float64 without a model: each part's terms are those of its own rows, to the bit."""
    objective = made(KTO_DPO)
    rows = uneven(objective)
    batch = collate(rows, chunks=chunks)
    policy, reference = objective.trained.logprobs(batch), objective.trained.reference_logprobs(batch)
    output = objective.compute_clamped(batch, policy, reference)
    for name, part in objective.parts.items():  # type: ignore[operator]
        view = batch.views[["binary", "pairs"].index(part.view)]
        own = part.compute_clamped(view, policy.of(view), reference.of(view)).loss[name]
        weighted = output.loss[name]
        assert float(weighted.total) == KTO_DPO["weights"][name] * float(own.total)
        assert weighted.step_count == len(view) == view.step.examples


def test_the_batch_of_a_view_is_that_of_its_rows_alone() -> None:
    with_labels = {"parts": THREE["parts"] | {"kto": KTO}, "weights": THREE["weights"] | {"kto": 1.0}}
    rows = uneven(made(with_labels))
    for own, kinds, view in zip(by_view(rows), rows[0].views, collate(rows).views, strict=True):
        expected = collate(own, mismatched=kinds.mismatched)
        width = expected.mask.shape[-1]
        assert torch.equal(view.mask[..., :width], expected.mask)
        assert not view.mask[..., width:].any()
        for name in ("ids", "step", "scores"):
            assert getattr(view, name) == getattr(expected, name), name
        for name in ("desirable", "group", "margins", "scores_chosen", "scores_rejected"):
            one, other = getattr(view, name), getattr(expected, name)
            assert one is other is None or torch.equal(one, other), name


def test_a_completion_is_computed_once() -> None:
    rows = tiny_rows(made(THREE), 3)
    batch = collate(rows)
    # A pair is read by DPO and SFT, and as two labelled and two scored completions.
    assert batch.mask.shape[:2] == (3, 2)
    assert sum(len(chunk.input_ids) for chunk in batch.chunks) == 6
    assert [tuple(view.mask.shape[:2]) for view in batch.views] == [(3, 2), (6, 1), (6, 1)]
    assert batch.total_tokens == sum(
        len(row.prompt) + len(branch) for view in by_view(rows) for row in view for branch in row.branches
    )


def test_mpo_across_views_is_mpo_on_pairs() -> None:
    """The mean of BCO over both completions of each pair is half the sum over the pair."""
    pairs = {"parts": {"dpo": DPO, "bco": BCOPair, "sft": SFT}, "weights": {"dpo": 0.8, "bco": 0.2, "sft": 1.0}}
    views = {"parts": {"dpo": DPO, "bco": BCO, "sft": SFT}, "weights": {"dpo": 0.8, "bco": 0.4, "sft": 1.0}}
    rows = tiny_rows(made(views), 4)
    loss, gradients = stepped(made(views), collate(rows))
    expected_loss, expected = stepped(made(pairs), collate(by_view(rows)[0]))
    torch.testing.assert_close(loss, expected_loss, rtol=1e-12, atol=0)
    for key, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[key], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["kto_dpo", "kto_sft"])
def test_accumulation_of_equal_micro_batches_equals_one_batch(name: str) -> None:
    """z₀ is that of the micro-step, so the micro-batches are alike."""
    zero = {"kto": partial(KTO, reference_point="zero")}
    parameters = MIXTURES[name] | {"parts": MIXTURES[name]["parts"] | zero}
    rows = tiny_rows(made(parameters), 12)
    parts = fit(objective_of(Mix, moved=0.1, **parameters), rows, batch_size=2, accumulate_grad_batches=3)
    assert_same(parts, fit(objective_of(Mix, moved=0.1, **parameters), rows, batch_size=6))


@pytest.mark.parametrize("name", ["kto_dpo", "kto_sft"])
@pytest.mark.parametrize("cut", [1, 2])
def test_uneven_ranks_equal_one_device(name: str, cut: int) -> None:
    objective = made(MIXTURES[name])
    assert_ranks_equal_one(objective, uneven(objective), cut=cut)


def test_the_reference_may_be_computed_beforehand() -> None:
    objective = made(KTO_DPO)
    rows = uneven(objective)
    reference = objective.trained.reference_logprobs(collate(rows))
    entries = {}
    for b, row in enumerate(rows):
        for k, branch in enumerate(row.branches):
            entries[entry_key(row.prompt, branch)] = reference.tokens[b, k, : len(branch)].float()
    batch = collate(rows, reference=ReferenceTable(entries))
    cached = objective.trained.reference_logprobs(batch)
    torch.testing.assert_close(cached.tokens.double(), reference.tokens, rtol=1e-6, atol=1e-6)
    for view in batch.views:
        assert torch.equal(cached.of(view).tokens, cached.tokens.flatten(0, 1)[view.places])


def test_packs_in_several_parts_are_one() -> None:
    rows = tiny_rows(made(KTO_DPO), 4)
    results = [stepped(made(KTO_DPO), collate(rows, packing=True, max_tokens=most)) for most in (None, 12)]
    assert len(collate(rows, packing=True, max_tokens=12).packs) > 2
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-7, atol=0)


@pytest.mark.parametrize("kind", [kind for kind in OBJECTIVES if kind is not Mix and described(kind).generates])
def test_every_loss_takes_a_step_without_an_example_of_its_view(kind: type[Objective]) -> None:
    own = described(kind)
    if own.control(True):
        return
    other: Any = DPO if own.view in ("binary", "scored") else partial(KTO, reference_point="zero")
    if own.view == "demonstrations":
        other = KTO
    parameters: dict[str, Any] = {"parts": {"own": kind, "other": other}, "weights": {"own": 1.0, "other": 1.0}}
    objective = made(parameters)
    rows = []
    for row in tiny_rows(objective, 3):
        views = [ViewRows(view.view, view.rows * (view.view != own.view), view.mismatched) for view in row.views]
        if any(view.rows for view in views):
            rows.append(joint_row(row.id, row.group, views))
    for packing in (False, True):
        output, metrics = objective.compute_batch(collate(rows, packing=packing))
        mine = {name: mean for name, mean in output.loss.items() if name.startswith("own")}
        assert mine
        assert {float(mean.of_step) for mean in mine.values()} == {0.0}
        assert all(float(mean.count) == 0 for mean in mine.values())
        assert loss_of(output).isfinite()
        loss_of(output).backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in objective.parameters())
        # A sum that is not finite would make the metric of the whole step useless.
        assert all(torch.as_tensor(mean.total).isfinite().all() for mean in metrics.values())


def test_a_step_without_a_part_logs_the_loss_of_the_others() -> None:
    objective = objective_of(Mix, moved=0.1, **KTO_SFT)
    rows = tiny_rows(objective, 8, labels=[False] * 4 + [True] * 4)
    first, second = fit(objective, rows, batch_size=4).steps
    assert "train/loss/sft" not in first
    assert first["train/loss"] == pytest.approx(first["train/loss/kto"])
    assert second["train/loss"] == pytest.approx(second["train/loss/kto"] + second["train/loss/sft"])


def test_rewards_are_those_of_the_first_part_that_has_any() -> None:
    for parameters, kinds in ((KTO_SFT, 1), (KTO_DPO, 1), (THREE, 2)):
        objective = made(parameters)
        batch = collate(tiny_rows(objective, 4))
        output, metrics = objective.compute_batch(batch)
        assert output.rewards is not None
        assert output.rewards.shape == (len(batch.view(output.view)), kinds)
        assert ("rewards/accuracies" in metrics) == (kinds == 2)


def test_humanline_clamps_the_parts_with_a_reference() -> None:
    humanline = Humanline(log_epsilon_P=-0.1, log_epsilon_R=0.1)
    rows = tiny_rows(made(KTO_SFT), 4)
    clamped = make_objective(partial(Mix, humanline=humanline, **KTO_SFT), moved=True)
    plain, other = (made_one.compute_batch(collate(rows))[0] for made_one in (made(KTO_SFT), clamped))
    assert float(plain.loss["sft"].total) == float(other.loss["sft"].total)
    assert float(plain.loss["kto"].total) != float(other.loss["kto"].total)


def test_what_each_view_needs() -> None:
    parts: dict[str, Any] = {"kto": KTO, "dpo": partial(DPO, margin_weight=1.0), "grpo": GRPO}
    needs = Mix(parts=parts, weights=dict.fromkeys(parts, 1.0)).data_needs()
    found = [(own.view, own.flags.mismatched, own.flags.margins, own.flags.grouped) for own in needs.views]
    assert found == [("binary", True, False, False), ("pairs", False, True, False), ("scored", False, False, True)]
    assert needs.view == "binary+pairs+scored"
    assert (needs.flags.mismatched, needs.flags.margins, needs.flags.grouped) == (True, True, True)
