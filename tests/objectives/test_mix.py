"""Mixtures of objectives."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch

from halos.commands.builders import objective_maker
from halos.objectives import (
    BCO,
    CPO,
    CSFT,
    DPO,
    GRPO,
    IPO,
    KTO,
    PPO,
    SFT,
    APODown,
    BradleyTerry,
    Humanline,
    Mix,
    Needs,
    Objective,
)
from halos.testing import check_property
from tests.configs import compose
from tests.loop_runs import assert_same, batch_of, evaluate, fit, objective_of, rows_for
from tests.pairs import POLICY, assert_term, log_ratios, nll_of_chosen, pairs, sums

DPO_SFT: dict[str, Any] = {"parts": {"dpo": partial(DPO, beta=0.3), "sft": SFT}, "weights": {"dpo": 2.0, "sft": 0.5}}


def mix(*kinds: Any, **base: Any) -> Mix:
    names = [getattr(kind, "__name__", "part").lower() for kind in kinds]
    return Mix(parts=dict(zip(names, kinds, strict=True)), weights=dict.fromkeys(names, 1.0), **base)


def test_terms_are_weighted_and_named_by_part() -> None:
    batch, policy, reference = pairs()
    output = Mix(**DPO_SFT).compute(batch, policy, reference)
    alone = DPO(beta=0.3).compute(batch, policy, reference)
    sft = SFT().compute(batch, policy, None)
    assert list(output.loss) == ["dpo", "sft"]
    assert float(output.loss["dpo"].total) == pytest.approx(2 * float(alone.loss["dpo"].total), rel=1e-14)
    assert float(output.loss["sft"].total) == pytest.approx(0.5 * float(sft.loss["sft"].total), rel=1e-14)
    assert (output.loss["dpo"].step_count, output.loss["sft"].step_count) == (4, 10)
    assert torch.equal(output.rewards, alone.rewards)


def test_irpo_by_hand() -> None:
    """−log σ(β(r_w − r_l)) − log π_θ(y_w) / |y_w|, averaged over pairs."""
    batch, policy, reference = pairs()
    output = objective_maker(compose("loss=irpo", "loss.parts.dpo.beta=0.3").loss)().compute(batch, policy, reference)
    assert_term(output.loss["dpo"], [math.log(1 + math.exp(-0.3 * (w - r))) for w, r in log_ratios()])
    assert_term(output.loss["sft"], [-w for w, _ in sums(POLICY, mean=True)])


def test_cpo_simpo_by_hand() -> None:
    batch, policy, _ = pairs()
    output = objective_maker(compose("loss=cpo_simpo").loss)().compute(batch, policy, None)
    means = sums(POLICY, mean=True)
    assert_term(output.loss["simpo"], [math.log(1 + math.exp(0.5 - 2 * (w - r))) for w, r in means])
    assert_term(output.loss["sft"], nll_of_chosen())


def test_parts_with_several_terms_and_metrics_keep_their_names_apart() -> None:
    objective = objective_of(
        Mix, parts={"ppo": PPO, "other": partial(PPO, critic_clip=0.5)}, weights={"ppo": 1.0, "other": 0.5}
    )
    output = evaluate(objective, batch_of(objective, rows_for(objective, 4)))
    assert list(output.loss) == [
        f"{part}/{term}" for part in ("ppo", "other") for term in ("policy", "critic", "kl_penalty")
    ]
    assert objective.needs == Needs(hidden=True, whole_step=True)
    assert objective.own_clip == 0.5
    heads = [name for name in dict(objective.named_parameters()) if "value_head" in name]
    assert len(heads) == 4
    both = objective_of(Mix, parts={"a": KTO, "b": BCO}, weights={"a": 1.0, "b": 1.0})
    metrics = evaluate(both, batch_of(both, rows_for(both, 4))).metrics
    assert list(metrics) == ["a/z0", "a/z0/raw", "b/delta"]
    assert both.needs.mismatched


def test_one_part_of_weight_1_trains_as_it_would_alone() -> None:
    rows = rows_for(DPO, 8)
    mixed = fit(objective_of(Mix, parts={"dpo": DPO}, weights={"dpo": 1.0}), rows, batch_size=4)
    assert_same(mixed, fit(objective_of(DPO), rows, batch_size=4))


def test_accumulation_equals_one_batch() -> None:
    rows = rows_for(DPO, 12)
    parts = fit(objective_of(Mix, moved=0.1, **DPO_SFT), rows, batch_size=2, accumulate_grad_batches=3)
    assert_same(parts, fit(objective_of(Mix, moved=0.1, **DPO_SFT), rows, batch_size=6))


@pytest.mark.parametrize(
    ("kinds", "view", "reference"),
    [
        ((DPO, SFT), "pairs", True),
        ((SFT, IPO), "pairs", True),
        ((SFT,), "demonstrations", False),
        ((KTO, BCO), "binary", True),
        ((DPO, KTO), "pairs+binary", True),
        ((SFT, KTO), "demonstrations+binary", True),
        ((SFT, KTO, DPO, GRPO), "pairs+binary+scored", True),
        ((partial(KTO, reference_free=True),), "binary", False),
    ],
)
def test_parts_that_can_share_a_batch(kinds: tuple[Any, ...], view: str, reference: bool) -> None:
    objective = mix(*kinds)
    assert (objective.view, objective.needs.reference) == (view, reference)


@pytest.mark.parametrize(
    ("kinds", "message"),
    [
        ((KTO, CSFT), r"loss\.parts\.csft: CSFT has control tokens"),
        ((BradleyTerry, DPO), r"loss\.parts\.bradleyterry: BradleyTerry has scores"),
        ((partial(DPO, gama=1),), r"^loss\.parts\.part does not take 'gama'; expected some of beta, label_smoothing, "),  # type: ignore[call-arg]
        ((partial(str),), r"loss\.parts\.part: expected an objective, found str"),
        ((3,), r"loss\.parts\.part: expected an objective, found 3; in YAML it needs _partial_: true"),
        ((), r"^loss\.weights: expected one for each of loss\.parts \(none\), found none$"),
    ],
)
def test_parts_that_cannot(kinds: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mix(*kinds)


@pytest.mark.parametrize("weights", [{"dpo": 1.0}, {"dpo": 1.0, "sft": 1.0, "kto": 1.0}, {"dpo": 1.0, "sft": -1.0}])
def test_weights_belong_to_parts(weights: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"loss\.weights"):
        Mix(parts={"dpo": DPO, "sft": SFT}, weights=weights)


def test_weights_for_other_parts_are_named() -> None:
    message = r"^loss\.weights: expected one for each of loss\.parts \(dpo, sft\), found dpo, kto$"
    with pytest.raises(ValueError, match=message):
        Mix(parts={"dpo": DPO, "sft": SFT}, weights={"dpo": 1.0, "kto": 1.0})


def test_what_couples_a_part_couples_the_mixture() -> None:
    def says(*kinds: Any) -> tuple[bool, bool, bool]:
        needs = mix(*kinds).needs
        return needs.grouped, needs.whole_step, needs.whole_micro_step

    assert says(DPO, IPO) == (False, False, False)
    assert says(partial(KTO, reference_point="zero"), BCO) == (False, False, True)
    assert says(GRPO, PPO) == (True, True, False)


def test_what_one_part_needs_the_mixture_needs() -> None:
    class Ends(SFT):
        needs = Needs(reference=False, last_hidden=True, moves=(0, 0))

    assert mix(Ends).needs == Ends.needs
    assert mix(APODown, IPO).needs == Needs()
    assert mix(APODown).needs.moves == (0, -1)
    check_property(partial(Mix, parts={"down": APODown}, weights={"down": 1.0}), "signs")
    with pytest.raises(
        ValueError, match=r"^loss\.parts: expected all parts to need last_hidden or none, found only ends"
    ):
        mix(SFT, Ends)


def test_a_part_has_no_backbone_of_its_own() -> None:
    (part,) = mix(SFT).parts.values()
    with pytest.raises(ValueError, match=r"^SFT: expected a backbone to train, found none"):
        part.configure_model()  # type: ignore[operator]


def test_a_part_that_marks_only_desirable_prompts_cannot_share_them() -> None:
    class Marks(SFT):
        def control(self, desirable: bool | None) -> str:
            return "<|good|>" if desirable else ""

    with pytest.raises(ValueError, match=r"loss\.parts\.marks: Marks has control tokens, which no other part could"):
        mix(Marks, DPO)


def test_humanline_clamps_only_the_parts_with_a_reference() -> None:
    batch, policy, reference = pairs()
    humanline = Humanline(log_epsilon_P=-0.1, log_epsilon_R=0.1)
    objective = Mix(humanline=humanline, **DPO_SFT)
    objective.check(1, None)
    clamped = objective.compute_clamped(batch, policy, reference)
    plain = Mix(**DPO_SFT).compute_clamped(batch, policy, reference)
    assert float(clamped.loss["dpo"].total) != float(plain.loss["dpo"].total)
    assert float(clamped.loss["sft"].total) == float(plain.loss["sft"].total)
    assert torch.equal(clamped.rewards, plain.rewards)
    sft = objective.parts["sft"]
    assert isinstance(sft, Objective)
    assert sft.humanline is None
    with pytest.raises(ValueError, match=r"^humanline\.enabled: expected a part with a reference, found cpo, sft$"):
        mix(CPO, SFT, humanline=humanline)


def test_labels_reach_the_parts() -> None:
    objective = mix(partial(KTO, desirable_weight="auto"))
    objective.see_labels(100, 200)
    (part,) = objective.parts.values()
    assert isinstance(part, Objective)
    assert part.desirable_weight == 2.0


def test_a_part_without_a_reference_is_not_shown_one() -> None:
    class Curious(SFT):
        def compute(self, batch: Any, policy: Any, reference: Any) -> Any:
            assert reference is None
            return super().compute(batch, policy, reference)

    batch, policy, reference = pairs()
    mix(DPO, Curious).compute(batch, policy, reference)
