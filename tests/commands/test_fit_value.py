"""``scripts/fit_value.py``: rewards from a policy, a judge or the data, and the loss that it writes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from halos.commands.fit_value import fit_value
from halos.evaluation.statistics import Estimate
from halos.evaluation.value_fit import ValueFit
from halos.evaluation.value_fit_report import loss_settings, loss_yaml, remarks
from halos.objectives import HALO
from halos.toy import Annotator, ToySource
from halos.toy.people import utility
from tests.commands.test_evaluate import ITSELF, compose
from tests.configs import compose as compose_run

FIXED = ("fix.curvature=0.88", "fix.loss_aversion=2", "fix.length_bias=0")
"""Two parameters are left, so that a fit takes no time."""


def labelled_file(folder: Path, *, size: int = 60, score: bool = True) -> Path:
    """Labels of the toy world's annotator, with the utilities as scores."""
    file, rows = folder / "labels.jsonl", []
    for record in ToySource(size=size, val_size=1, annotator=Annotator(noise=0.3)).train().records:
        if isinstance(record.prompt, str):
            rows += [
                {"prompt": record.prompt, "completion": reply.text, "label": reply.desirable}
                | ({"score": utility(record.prompt, reply.text)} if score else {})
                for reply in record.completions
            ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def fitted(**ends: tuple[float, float | None, float | None]) -> ValueFit:
    """A fit with the given estimates and ends of their intervals."""
    estimates = {name: Estimate(value, low, high, 100) for name, (value, low, high) in ends.items()}
    return ValueFit(estimates, {}, -10.0, -12.0, 0.1)


def test_scores_in_the_data_are_fitted_and_written_as_a_loss(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = ("data=files", f"data.train={labelled_file(tmp_path)}", "split=train")
    result = fit_value(compose("fit_value", *data, *FIXED, f"output={tmp_path}/o", "name=ours"))
    assert result == json.loads((tmp_path / "o" / "fit_value.json").read_text())
    assert list(result["estimates"]) == ["expectation", "noise"]
    assert result["estimates"]["expectation"]["low"] < 0.65 < result["estimates"]["expectation"]["high"]
    printed = capsys.readouterr().out
    assert f"train with it: python scripts/train.py --config-dir {tmp_path}/o loss=ours" in printed
    written = yaml.safe_load((tmp_path / "o" / "loss" / "ours.yaml").read_text())
    assert written["defaults"] == ["halo", "_self_"]
    assert (written["name"], written["alpha"], written["loss_aversion"]) == ("ours", 0.88, 2)
    words = [f"loss.{key}={value}" for key, value in written.items() if key not in ("defaults", "name")]
    node = dict(compose_run("loss=halo", *words).loss)
    del node["_target_"], node["name"]
    objective = HALO(None, **node)
    assert objective.value.parameters == {"alpha": 0.88, "loss_aversion": 2}


@pytest.mark.long
def test_a_judge_and_a_policy_give_rewards(tmp_path: Path) -> None:
    toy = ("data=toy", "data.source.val_size=40", "data.source.annotator.noise=0.3", "progress=false")
    judged = fit_value(compose("fit_value", *toy, *FIXED, "judge=truth", f"output={tmp_path}/a"))
    assert judged["answers"] == "80 labels and 0 pairs, with scores of TruthJudge"
    scorer = tmp_path / "scorer"
    changed_reference(scorer)
    words = (f"policy={scorer}", ITSELF[1], f"output={tmp_path}/b", *FIXED[:2])
    found = fit_value(compose("fit_value", *toy, *words))
    assert found["answers"].endswith(f"with log-ratios of {scorer} to pkg://halos.toy/reference")
    assert set(found["estimates"]) == {"expectation", "noise", "length_bias"}


def changed_reference(folder: Path) -> None:
    """Save the toy world's reference with a little noise in its last layer, as a policy."""
    import torch

    from halos.policy.loading import ModelSpec

    spec = ModelSpec(path="pkg://halos.toy/reference")
    model = spec.load()
    torch.manual_seed(0)
    with torch.no_grad():
        model.lm_head.weight += 0.05 * torch.randn_like(model.lm_head.weight)
    model.save_pretrained(folder)
    spec.tokenizer().save_pretrained(folder)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("output=null",), "output: expected a folder for the results"),
        (("size=0",), "size: expected a whole number from 1 on or null"),
        (("name=a/b",), "name: expected letters, digits and _, found 'a/b'"),
        (("fix.noise=0",), "fix.noise: expected a number above 0, found 0"),
        (("judge=truth",), "judge=truth: expected data whose true reward is known"),
        (("judge=truth", "policy=pkg://halos.toy/reference"), "judge: expected null with a policy"),
        (("policy=pkg://halos.toy/reference",), "reference: expected a model, found none"),
        (("split=val",), "split: expected held-out records"),
        (("data.select.labels_from_scores=median",), "data.select.labels_from_scores: expected null, or rewards"),
    ],
)
def test_what_cannot_work_is_refused(tmp_path: Path, words: tuple[str, ...], message: str) -> None:
    data = ("data=files", f"data.train={labelled_file(tmp_path, size=4)}", "split=train", f"output={tmp_path}/o")
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        fit_value(compose("fit_value", *data, *words))


def test_a_command_without_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^data: expected data=toy, data=files"):
        fit_value(compose("fit_value", f"output={tmp_path}"))


def test_data_without_scores_or_labels_are_refused(tmp_path: Path) -> None:
    file = labelled_file(tmp_path, size=4, score=False)
    words = ("data=files", f"data.train={file}", "split=train", f"output={tmp_path}/o")
    with pytest.raises(ValueError, match=r"^policy: expected a policy, a judge or scores of the labelled replies"):
        fit_value(compose("fit_value", *words))
    file.write_text('{"prompt": "q", "completion": "a", "score": 1}\n')
    with pytest.raises(ValueError, match=r"^data: expected labels or pairs, found neither"):
        fit_value(compose("fit_value", *words))
    assert not (tmp_path / "o").exists()


def test_a_parameter_without_bounds_keeps_the_losss_default() -> None:
    fit = fitted(curvature=(0.7, 0.5, 0.9), loss_aversion=(9.0, 1.5, None))
    settings, reasons = loss_settings(fit)
    assert settings == {"alpha": 0.7, "noise": 0.1}
    assert reasons[0] == "loss_aversion: its default, as the answers do not bound it"
    assert "caution     these answers do not bound loss_aversion from above" in list(remarks(fit))
    assert yaml.safe_load(loss_yaml("mine", fit, "100 labels"))["alpha"] == 0.7


def test_a_value_that_is_flat_at_the_start_is_not_written() -> None:
    settings, reasons = loss_settings(fitted(curvature=(1.4, 1.1, 1.9), loss_aversion=(2.0, 1.5, 3.0)))
    assert settings["alpha"] == 1
    assert reasons[0] == "alpha: 1 in place of 1.4, with which the value is flat at u = 0"


@pytest.mark.parametrize(("aversion", "written"), [(4.4, True), (4.6, False)])
def test_noise_is_written_where_gains_keep_half_of_their_slope(aversion: float, written: bool) -> None:
    # 0.1 λ = 0.45 = (1 − 0.1) / 2 at λ = 4.5.
    fit = fitted(curvature=(0.8, 0.7, 0.9), loss_aversion=(aversion, 1.5, 9.0))
    assert ("noise" in loss_settings(fit)[0]) == written


def test_few_answers_against_the_value_and_a_taste_for_length_are_pointed_out() -> None:
    lines = list(remarks(fitted(length_bias=(-0.2, -0.3, -0.1))))
    assert any(line.startswith("caution     only about 10 of 100 answers do") for line in lines)
    assert any("prefer shorter replies" in line for line in lines)
    assert not any("prefer" in line for line in remarks(fitted(length_bias=(-0.2, -0.3, 0.1))))
