"""Claims: a verdict follows from differences paired by seed, and every claim of an experiment can be decided."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import hydra
import pytest
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf, open_dict

from halos.comparison.claim_figure import claim_figure
from halos.comparison.claims import FAILED, HELD, UNDECIDED, as_markdown, decide
from halos.comparison.runs import Run, experiment_keys
from halos.config.folder import config_folder

EXPERIMENTS = sorted(
    file.stem for file in (Path(config_folder()) / "experiment").glob("claims_*.yaml") if file.stem != "claims_tune"
)

CLAIM: dict[str, Any] = {
    "name": "noise",
    "states": "KTO stands noise better than DPO",
    "metric": "samples/policy_desirable",
    "measure": "share",
    "figure": {"x": "data.source.noise", "label": "noise", "lines": ["loss.name"]},
    "contrasts": [
        {
            "at": "at 40 %",
            "of": {"loss.name": "kto", "data.source.noise": 0.4},
            "against": {"loss.name": "dpo", "data.source.noise": 0.4},
            "above": 0.0,
        }
    ],
}


def run(loss: str, seed: int, share: float, noise: float = 0.4, claim: dict[str, Any] | None = CLAIM) -> Run:
    config = {"loss.name": loss, "data.source.noise": noise}
    numbers = {"samples/policy_desirable": share, "samples/reference_desirable": 0.5, "samples/kl": 2 * share}
    return Run(Path(f"{loss}-{noise}-{seed}"), seed, config, numbers, claim=claim)


def runs(kto: list[float], dpo: list[float]) -> list[Run]:
    return [run(loss, seed, x) for loss, xs in (("kto", kto), ("dpo", dpo)) for seed, x in enumerate(xs)]


@pytest.mark.parametrize(
    ("kto", "dpo", "outcome"),
    [
        # Differences 0.1, 0.2, 0.3: mean 0.2, and t = 4.303 at two degrees of freedom makes it 0.2 ± 0.248.
        ([0.8, 0.8, 0.8], [0.7, 0.6, 0.5], UNDECIDED),
        ([0.8, 0.8, 0.8], [0.62, 0.60, 0.58], HELD),  # 0.2 ± 0.050
        ([0.6, 0.6, 0.6], [0.78, 0.80, 0.82], FAILED),
        # The seeds' own spread cancels: without pairing, this would be undecided.
        ([0.3, 0.6, 0.9], [0.2, 0.49, 0.81], HELD),
        ([0.8], [0.2], UNDECIDED),  # no interval
        ([0.5, 0.6, 0.7], [0.5, 0.6, 0.7], FAILED),  # the same in every seed, so not above
    ],
)
def test_a_claim_holds_if_the_interval_of_paired_differences_lies_above(
    kto: list[float], dpo: list[float], outcome: str
) -> None:
    (verdict,) = decide(runs(kto, dpo))
    assert verdict.outcome == outcome


def test_the_sentence_has_the_interval_and_the_number_of_seeds() -> None:
    (verdict,) = decide(runs([0.8, 0.8, 0.8], [0.62, 0.60, 0.58]))
    assert verdict.sentence() == (
        "“KTO stands noise better than DPO” held here. at 40 %: the share differs by +0.200, claimed to be above 0; "
        "95 % interval +0.150 to +0.250, 3 seeds (held)."
    )
    assert "claim_noise.png" in as_markdown([verdict])


def test_more_looks_need_wider_intervals() -> None:
    (once,) = decide(runs([0.8, 0.8, 0.8], [0.7, 0.68, 0.66]))
    # Differences 0.10, 0.12, 0.14: 0.12 ± t · 0.02 / √3, where t is 4.303 at 95 % and 7.649 at 98.33 %.
    assert once.outcome == HELD
    looked = CLAIM | {"looks": 3, "contrasts": [CLAIM["contrasts"][0] | {"above": 0.05}]}
    both = {"kto": [0.8, 0.8, 0.8], "dpo": [0.7, 0.68, 0.66]}
    (verdict,) = decide([run(k, seed, x, claim=looked) for k, xs in both.items() for seed, x in enumerate(xs)])
    difference = verdict.differences[0]
    assert difference is not None
    assert (difference.low, difference.high) == pytest.approx((0.12 - 7.6488 * 0.02 / 3**0.5, 0.12 + 0.08832), abs=1e-4)
    assert verdict.outcome == UNDECIDED
    assert "98.3 % interval" in verdict.sentence()


def test_a_match_within_a_margin_and_a_metric_of_its_own() -> None:
    contrast = {**CLAIM["contrasts"][0], "above": -0.1}
    of_kl = {**contrast, "metric": "samples/kl", "measure": "KL", "above": -0.05}
    claim = {**CLAIM, "contrasts": [contrast, of_kl]}
    shares = {"kto": [0.50, 0.51, 0.52], "dpo": [0.55, 0.56, 0.57]}
    (verdict,) = decide([run(k, seed, x, claim=claim) for k, xs in shares.items() for seed, x in enumerate(xs)])
    assert verdict.outcomes == [HELD, FAILED]  # −0.05 is above −0.1; −0.1 is below −0.05
    assert verdict.outcome == FAILED


def test_runs_that_are_not_there_leave_a_claim_undecided_and_only_seeds_that_both_have_count() -> None:
    (verdict,) = decide([run("kto", seed, 0.8) for seed in range(3)])
    assert (verdict.outcome, verdict.differences) == (UNDECIDED, [None])
    assert "no finished runs" in verdict.sentence()
    (verdict,) = decide([*runs([0.8, 0.8], [0.7, 0.6]), run("kto", 7, 0.0)])
    assert verdict.differences[0] is not None
    assert verdict.differences[0].n == 2
    assert verdict.differences[0].value == pytest.approx(0.15)


CONTRAST, FIGURE = CLAIM["contrasts"][0], CLAIM["figure"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"states": 3}, "states: expected a text, found 3"),
        ({"looks": 0}, "looks: expected a whole number from 1 on, found 0"),
        ({"looks": "3"}, "looks: expected a whole number, found '3'"),
        ({"figure": "noise"}, "figure: expected keys with values, found 'noise'"),
        ({"contrasts": "all"}, "contrasts: expected a list of contrasts, found 'all'"),
        ({"figure": {**FIGURE, "log": "yes"}}, "figure.log: expected true or false, found 'yes'"),
        (
            {"figure": {**FIGURE, "lines": "seed"}},
            "figure.lines: expected a list of configuration",
        ),
        (
            {"figure": {**FIGURE, "lines": [3]}},
            "figure.lines: expected a list of configuration",
        ),
        ({"contrasts": [{**CONTRAST, "above": "0"}]}, "contrasts[0].above: expected a number, found '0'"),
        (
            {"contrasts": [{**CONTRAST, "above": True}]},
            "contrasts[0].above: expected a number, found",
        ),
        ({"contrasts": [{**CONTRAST, "of": 1}]}, "contrasts[0].of: expected keys with values, found 1"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused_with_the_right_one(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"{re.escape('config.yaml: claim.' + message)}"):
        decide([run("kto", 0, 0.5, claim=CLAIM | change)])


def test_what_cannot_be_decided_is_refused() -> None:
    with pytest.raises(ValueError, match=r"claim noise: expected one run of seed 0 with \{'loss.name': 'kto'.* two"):
        decide([run("kto", 0, 0.5), run("kto", 0, 0.6)])
    with pytest.raises(ValueError, match=r"claim noise: kto-0.4-0 and dpo-0.4-0 state it differently"):
        decide([run("kto", 0, 0.5), run("dpo", 0, 0.6, claim={**CLAIM, "states": "else"})])
    for change, message in (
        (
            {"figure": {"x": "data.source.nose", "label": ""}},
            "expected a key of the configuration or a metric, found",
        ),
        ({"contrasts": []}, "claim.contrasts: expected at least one"),
        ({"contrasts": [{"at": "", "of": {}}]}, r"claim.contrasts\[0\] .*missing a required .*argument: 'against'"),
        ({"contrasts": [{**CLAIM["contrasts"][0], "of": {"loss.nam": 1}}]}, "found loss.nam"),
        ({"contrasts": [{**CLAIM["contrasts"][0], "metric": "samples/no"}]}, "expected samples/no in the summary"),
        ({"extra": 1}, "config.yaml: claim does not take 'extra' .*; expected some of name, states"),
    ):
        with pytest.raises(ValueError, match=message):
            decide([run("kto", 0, 0.5, claim={**CLAIM, **change})])


def test_the_figure_has_a_line_for_each_loss_with_intervals_and_the_reference() -> None:
    some = [run(loss, s, 0.5 + s / 10 + n / 4, n) for loss in ("kto", "dpo") for s in (0, 1, 2) for n in (0.4, 0.0)]
    (verdict,) = decide(some)
    _, axes = claim_figure(verdict)
    assert sorted(text.get_text() for text in axes.get_legend().get_texts()) == ["dpo", "kto", "reference"]
    line = axes.containers[0]
    assert list(line[0].get_xdata()) == [0.0, 0.4]
    assert list(line[0].get_ydata()) == pytest.approx([0.6, 0.7])
    low, high = line[2][0].get_segments()[0][:, 1]
    assert (low, high) == pytest.approx((0.6 - 4.302653 * 0.1 / 3**0.5, 0.6 + 4.302653 * 0.1 / 3**0.5), abs=1e-6)


def test_runs_with_different_references_have_no_line_for_them() -> None:
    some = [run(loss, seed, 0.5 + seed / 10) for loss in ("kto", "dpo") for seed in (0, 1, 2)]
    some[0].numbers["samples/reference_desirable"] = 0.9  # it was trained before, as by before=sft
    _, axes = claim_figure(decide(some)[0])
    assert sorted(text.get_text() for text in axes.get_legend().get_texts()) == ["dpo", "kto"]


@pytest.mark.parametrize(("name", "turned"), [("kto", False), ("kto_with_a_name_of_many_letters", True)])
def test_long_names_below_the_axis_are_turned(name: str, turned: bool) -> None:
    claim = {**CLAIM, "figure": {"x": "loss.name", "label": "loss"}}
    some = [run(loss, 0, 0.5, n, claim=claim) for loss in (f"{name}_1", f"{name}_2") for n in (0.2, 0.0)]
    _, axes = claim_figure(decide(some)[0])
    assert {bool(label.get_rotation()) for label in axes.get_xticklabels()} == {turned}


def jobs(experiment: str) -> tuple[list[DictConfig], set[str]]:
    """What Hydra's sweeper makes of the experiment, composed for its first seed, and the names of their settings."""
    with hydra.initialize_config_dir(config_folder(), version_base="1.3"):
        made = hydra.compose("train", [f"experiment={experiment}"], return_hydra_config=True)
        swept = [f"{key}={words}" for key, words in made.hydra.sweeper.params.items()]
        (batch,) = BasicSweeper.split_arguments(OverridesParser.create().parse_overrides(swept), max_batch_size=None)
        assert len({word for job in batch for word in job if word.startswith("seed=")}) >= 3
        first = [job for job in batch if "seed=0" in job]
        words = [[f"experiment={experiment}", *job, "output_dir=out"] for job in first]
        cfgs = [hydra.compose("train", job, return_hydra_config=True) for job in words]
    tuned = {cfg.hydra.runtime.choices.tuned for cfg in cfgs}
    for cfg in cfgs:
        with open_dict(cfg):
            del cfg["hydra"]
    return cfgs, tuned


@pytest.mark.long
@pytest.mark.parametrize(
    "experiment",
    [name if name == "claims_imbalance" else pytest.param(name, marks=pytest.mark.slow) for name in EXPERIMENTS],
)
def test_an_experiment_sweeps_each_run_that_its_claim_compares_once(experiment: str) -> None:
    cfgs, tuned = jobs(experiment)
    nodes: Any = [OmegaConf.to_container(cfg, resolve=True) for cfg in cfgs]
    configs = [experiment_keys(node) for node in nodes]
    claim: Any = OmegaConf.to_container(cfgs[0].claim, resolve=True, throw_on_missing=True)
    for contrast in claim["contrasts"]:
        sides = [
            [config for config in configs if all(config.get(key) == value for key, value in wanted.items())]
            for wanted in (contrast["of"], contrast["against"])
        ]
        assert [len(side) for side in sides] == [1, 1], contrast["at"]
        assert sides[0] != sides[1]
    for name in tuned:  # or the toy world's settings would be taken without a word
        assert name.startswith("claims_")
        assert (Path(config_folder()) / "tuned" / f"{name}.yaml").is_file()
    for cfg in cfgs:  # settings looked up by what is swept are there for all of it
        assert cfg.optim.lr > 0
        assert cfg.optim.eps > 0
