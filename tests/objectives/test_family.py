"""The family in one table: each member's defaults and the names under which it reports."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor

from halos.objectives import (
    AOT,
    BCO,
    CPO,
    CSFT,
    DPO,
    EXO,
    FDPO,
    GRPO,
    HALO,
    IPO,
    KTO,
    NCA,
    ORPO,
    PPO,
    SFT,
    SPPO,
    AOTUnpaired,
    APODown,
    APOZero,
    BCOPair,
    BradleyTerry,
    DiscoPOP,
    EXORewards,
    Hinge,
    Humanline,
    InfoNCA,
    Mix,
    NCAPair,
    Needs,
    Objective,
    RobustDPO,
    SimPO,
    SLiC,
    aot_loss,
    apo_down_loss,
    apo_zero_loss,
    bco_loss,
    bco_pair_loss,
    cpo_loss,
    discopop_loss,
    dpo_loss,
    exo_loss,
    exo_rw_loss,
    f_dpo_loss,
    grpo_loss,
    hinge_loss,
    infonca_loss,
    ipo_loss,
    kto_loss,
    nca_loss,
    nca_pair_loss,
    ppo_loss,
    robust_dpo_loss,
    simpo_loss,
    slic_loss,
    sppo_loss,
)
from halos.objectives.bco import RewardShift
from halos.optim import AdamW
from halos.testing.examples import evaluate, make_inputs, make_objective, tiny_rows
from tests.loop_runs import OBJECTIVES

DPO_AND_SFT: Any = partial(Mix, parts={"dpo": DPO, "sft": SFT}, weights={"dpo": 1.0, "sft": 0.1})


@dataclass(frozen=True)
class Member:
    """``rewards``: columns of the rewards [B, K], 0 for none."""

    make: Any
    terms: tuple[str, ...]
    rewards: int
    defaults: dict[str, Any] = field(default_factory=dict)
    metrics: tuple[str, ...] = ()


FAMILY = {
    KTO: Member(
        KTO,
        ("kto",),
        1,
        {
            "beta": 0.1,
            "desirable_weight": 1.0,
            "undesirable_weight": 1.0,
            "needs": Needs(mismatched=True, whole_micro_step=True),
        },
        ("z0", "z0/raw"),
    ),
    BCO: Member(BCO, ("bco",), 1, {"beta": 0.1}, ("delta",)),
    BCOPair: Member(BCOPair, ("bco_pair",), 2, {"beta": 0.1}, ("delta",)),
    AOT: Member(AOT, ("aot",), 2, {"beta": 0.1, "label_smoothing": 0.0}),
    AOTUnpaired: Member(AOTUnpaired, ("aot_unpaired",), 2, {"beta": 0.1, "label_smoothing": 0.0}),
    DiscoPOP: Member(DiscoPOP, ("discopop",), 2, {"beta": 0.1, "tau": 0.05}),
    EXO: Member(EXO, ("exo",), 2, {"beta": 0.1, "label_smoothing": 0.001}),
    EXORewards: Member(EXORewards, ("exo_rw",), 1, {"beta": 0.1, "alpha": 1.0}),
    FDPO: Member(FDPO, ("f_dpo",), 2, {"beta": 0.1, "divergence": "jensen_shannon", "alpha": None}),
    Hinge: Member(Hinge, ("hinge",), 2, {"beta": 0.1}),
    NCA: Member(NCA, ("nca",), 1, {"beta": 0.1, "alpha": 1.0}),
    InfoNCA: Member(InfoNCA, ("infonca",), 1, {"beta": 0.1, "alpha": 1.0}),
    NCAPair: Member(NCAPair, ("nca_pair",), 2, {"beta": 0.1}),
    SPPO: Member(SPPO, ("sppo",), 2, {"beta": 0.1, "soft": False}),
    DPO: Member(DPO, ("dpo",), 2, {"beta": 0.1, "label_smoothing": 0.0}),
    RobustDPO: Member(RobustDPO, ("robust_dpo",), 2, {"beta": 0.1, "label_smoothing": 0.1}),
    IPO: Member(IPO, ("ipo",), 2, {"beta": 0.1}),
    APOZero: Member(APOZero, ("apo_zero",), 2, {"beta": 0.1}),
    APODown: Member(APODown, ("apo_down",), 2, {"beta": 0.1}),
    SimPO: Member(SimPO, ("simpo",), 2, {"beta": 2.0, "gamma": 0.5}),
    ORPO: Member(ORPO, ("sft", "odds"), 2, {"beta": 0.1}),
    CPO: Member(CPO, ("prefer", "sft"), 2, {"beta": 0.1, "alpha": 1.0}),
    SLiC: Member(SLiC, ("calibration", "sft"), 2, {"delta": 1.0, "lam": 0.1}),
    PPO: Member(
        PPO,
        ("policy", "critic", "kl_penalty"),
        1,
        {"beta": 0.1, "clip_range": 0.5, "gamma": 1.0, "lam": 0.95, "critic_coefficient": 0.5, "own_clip": 1.0},
    ),
    GRPO: Member(GRPO, ("policy", "kl_penalty"), 1, {"beta": 0.04, "clip_range": 0.5}, ("groups/incomplete",)),
    HALO: Member(
        HALO,
        ("halo",),
        1,
        {"beta": 1.0, "weights": {"desirable_weight": 1.0, "undesirable_weight": 1.0}, "threshold": 0.0},
        ("z0", "z0/raw"),
    ),
    BradleyTerry: Member(BradleyTerry, ("bradley_terry",), 2),
    CSFT: Member(CSFT, ("csft",), 0, {"control_tokens": ("<|good|>", "<|bad|>")}),
    SFT: Member(SFT, ("sft",), 0, {"average": "tokens"}),
    Mix: Member(DPO_AND_SFT, ("dpo", "sft"), 2, {"weights": {"dpo": 1.0, "sft": 0.1}, "needs": Needs()}),
}


def test_the_table_is_complete() -> None:
    assert set(FAMILY) == set(OBJECTIVES)


@pytest.mark.parametrize("kind", FAMILY)
def test_defaults(kind: type[Objective]) -> None:
    objective = FAMILY[kind].make()
    assert {name: getattr(objective, name) for name in FAMILY[kind].defaults} == FAMILY[kind].defaults


@pytest.mark.parametrize("kind", FAMILY)
def test_the_bases_parameters_reach_it(kind: type[Objective]) -> None:
    optim = AdamW(lr=0.123)
    objective = FAMILY[kind].make(seed=7, optim=optim)
    assert objective.seed == 7
    assert objective._optim is optim


@pytest.mark.parametrize("kind", FAMILY)
def test_terms_metrics_and_rewards(kind: type[Objective]) -> None:
    member = FAMILY[kind]
    objective = make_objective(member.make)
    output = evaluate(objective, make_inputs(objective, tiny_rows(objective, 4))).output
    assert tuple(output.loss) == member.terms
    assert tuple(output.metrics) == member.metrics
    assert (0 if output.rewards is None else output.rewards.shape[1]) == member.rewards
    # Each example counts once: once as a number of its own, or as one that all of the micro-batch share.
    assert {float(mean.count) for mean in output.metrics.values()} <= {1.0, 4.0}


def column(seed: int, *shape: int) -> Tensor:
    return -3 * torch.rand(*(shape or (5,)), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


LABELS = torch.tensor([True, False, True, False, True])
MASK = torch.arange(3) < torch.tensor([3, 2, 1, 3, 2])[:, None]
PAIR = (column(0), column(1))
FUNCTIONS: dict[Callable[..., Any], tuple[tuple[Any, ...], dict[str, float]]] = {
    kto_loss: ((*PAIR, LABELS, 0.3), {"beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 1.0}),
    bco_loss: ((*PAIR, LABELS, 0.3), {"beta": 0.1}),
    aot_loss: (PAIR, {"beta": 0.1, "label_smoothing": 0.0}),
    bco_pair_loss: ((*PAIR, 0.3), {"beta": 0.1}),
    discopop_loss: (PAIR, {"beta": 0.1, "tau": 0.05}),
    exo_loss: (PAIR, {"beta": 0.1, "label_smoothing": 0.001}),
    exo_rw_loss: (
        (column(0), column(1), torch.tensor([0, 0, 1, 1, 1]), torch.ones(5).double()),
        {"beta": 0.1, "alpha": 1.0},
    ),
    f_dpo_loss: (PAIR, {"beta": 0.1}),
    hinge_loss: (PAIR, {"beta": 0.1}),
    nca_loss: ((column(0), column(1).exp()), {"beta": 0.1}),
    infonca_loss: (
        (column(0), column(1).exp(), torch.tensor([0, 0, 1, 1, 1]), torch.ones(5).double()),
        {"beta": 0.1},
    ),
    nca_pair_loss: (PAIR, {"beta": 0.1}),
    sppo_loss: ((column(0), column(1).exp()), {"beta": 0.1}),
    dpo_loss: ((*PAIR, column(2), column(3)), {"beta": 0.1, "label_smoothing": 0.0}),
    robust_dpo_loss: (PAIR, {"beta": 0.1, "label_smoothing": 0.1}),
    ipo_loss: (PAIR, {"beta": 0.1}),
    apo_zero_loss: (PAIR, {"beta": 0.1}),
    apo_down_loss: (PAIR, {"beta": 0.1}),
    simpo_loss: (PAIR, {"beta": 2.0, "gamma": 0.5}),
    cpo_loss: (PAIR, {"beta": 0.1}),
    slic_loss: (PAIR, {"delta": 1.0}),
    ppo_loss: (
        (column(0, 5, 3), column(1, 5, 3), column(2, 5, 3), column(3), MASK),
        {"clip_range": 0.5, "gamma": 1.0, "lam": 0.95},
    ),
    grpo_loss: ((column(0, 5, 3) - column(1, 5, 3), column(2), MASK), {"clip_range": 0.5}),
}


def numbers(found: Any) -> list[Any]:
    return [part.tolist() for part in (found if isinstance(found, tuple) else (found,))]


@pytest.mark.parametrize("function", FUNCTIONS)
def test_defaults_of_the_pure_functions(function: Callable[..., Any]) -> None:
    tensors, defaults = FUNCTIONS[function]
    plain = numbers(function(*tensors))
    assert numbers(function(*tensors, **defaults)) == plain
    for name, value in defaults.items():
        assert numbers(function(*tensors, **(defaults | {name: value + 0.3 if value < 0.9 else value - 0.3}))) != plain


def test_the_range_of_humanline() -> None:
    assert (Humanline().log_epsilon_P, Humanline().log_epsilon_R) == (-1.0, 1.5)


def test_a_shift_goes_on_after_millions_of_rewards() -> None:
    shift = RewardShift()
    shift.counts.fill_(2.0**24)  # where a float32 count of single rewards would stop
    shift.update(torch.full((8,), 2.0**20), torch.tensor([True, False]).repeat(4))
    assert shift.counts.tolist() == [2**24 + 4] * 2
    assert shift.means.tolist() == pytest.approx([4 * 2**20 / (2**24 + 4)] * 2)


def test_papers_stand_in_their_modules_docstring() -> None:
    for kind in OBJECTIVES:
        if kind in (SFT, Mix):
            assert kind.paper is None
            continue
        title, address = kind.paper
        assert title.strip() == title
        number = address.removeprefix("https://arxiv.org/abs/")
        assert re.fullmatch(r"\d{4}\.\d{5}", number)
        assert number in inspect.getmodule(kind).__doc__


def test_without_a_backbone_it_cannot_be_trained() -> None:
    objective = KTO(beta=0.1)
    trainer = pl.Trainer(max_steps=1, logger=False, enable_checkpointing=False, enable_progress_bar=False)
    error = r"^KTO: expected a backbone to train, found none; pass one to the constructor: KTO\(backbone, …\)$"
    with pytest.raises(ValueError, match=error):
        trainer.fit(objective, [])
