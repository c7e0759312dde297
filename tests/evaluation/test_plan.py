"""A plan is checked before weights are read, and the evaluator's stages build on each other."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import FrozenInstanceError, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from halos.data.records.record import Completion, Record
from halos.data.rows.chat_tokens import Limits
from halos.data.sources.feedback_files import FeedbackFiles
from halos.data.views.selection import Selection
from halos.evaluation.duels import WinRate
from halos.evaluation.evaluator import evaluate
from halos.evaluation.heldout import held_out
from halos.evaluation.plan import EvaluationPlan, Settings
from halos.evaluation.results import Results, write_results
from halos.evaluation.statistics import Estimate
from halos.judges.base import CompletionJudge, PromptCompletion
from halos.policy.loading import ModelSpec
from halos.policy.lookup import find_policy
from halos.sampling.prompts import HeldData

TOY = "pkg://halos.toy/reference"
PROMPTS = ("i bought a lamp on monday. i paid twice.", "the kettle is broken.")


class Length(CompletionJudge):
    """Likes long completions."""

    def scores(self, said: Sequence[PromptCompletion]) -> list[float | None]:
        return [float(len(text)) for _, text in said]


def plan(**changes: Any) -> EvaluationPlan:
    records = [
        Record(str(n), prompt, (Completion("thanks. we will check it."), Completion("hm.")), ((0, 1),))
        for n, prompt in enumerate(PROMPTS)
    ]
    policy = find_policy("policy", TOY)
    data = HeldData(FeedbackFiles("unused"), Limits(64), "plain", records, records, Selection(), Counter())
    parts: dict[str, Any] = {
        "settings": Settings(resamples=10, max_new_tokens=8, progress=False),
        "policy": policy,
        "reference": policy,
        "data": data,
        "held": held_out(records),
    }
    return EvaluationPlan(**{**parts, **changes})


@pytest.mark.parametrize(
    ("setting", "value"),
    [("seed", -1), ("batch_size", True), ("resamples", 0), ("samples", 1.5), ("size", -1), ("top_p", 0.0)],
)
def test_settings_are_checked_when_they_are_made(setting: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"^{setting}: expected"):
        Settings(**{setting: value})  # type: ignore[arg-type]


def test_a_plan_is_checked_when_it_is_made_and_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ModelSpec, "load", lambda *_, **__: pytest.fail("loaded"))
    made = plan()
    with pytest.raises(FrozenInstanceError):
        made.judge = Length()  # type: ignore[misc]
    with pytest.raises(ValueError, match="opponent: expected reference=MODEL to compare with, found none"):
        plan(judge=Length(), reference=None)
    with pytest.raises(ValueError, match="engine: expected transformers or vllm, found 'x'"):
        plan(settings=Settings(engine="x"))
    assert plan(settings=Settings(engine="x", size=0)).settings.engine == "x"  # nothing is sampled


def test_each_stage_has_the_results_of_those_before_it() -> None:
    policy = find_policy("policy", TOY)
    stages = list(evaluate(plan(judge=Length(), opponent="reference", opponent_policy=policy)))
    feedback, drawn, scored, opponents, judged = stages
    assert feedback.samples is None
    assert len(feedback.rewards or ()) == 4
    assert feedback.margins == [0.0, 0.0]
    assert [one["prompt"] for one in drawn.samples or ()] == list(PROMPTS)
    assert drawn.metrics == feedback.metrics
    assert set(scored.metrics) - set(drawn.metrics) > {"samples/kl", "samples/truncated"}
    assert [one["opponent"] for one in opponents.samples or ()] == [one["completions"] for one in drawn.samples or ()]
    assert judged.win_rate is not None
    assert judged.win_rate.rate.value == 0.5  # it met itself, with the same seed
    assert "judge/desirable_policy" not in judged.metrics  # labels by the median are not absolute
    for earlier, later in pairwise(stages):
        assert earlier.metrics.items() <= later.metrics.items()


def test_nothing_is_sampled_where_size_is_zero() -> None:
    (only,) = evaluate(plan(settings=Settings(resamples=10, size=0, progress=False)))
    assert only.samples is None


def test_files_hold_what_was_computed(tmp_path: Path) -> None:
    first = Results(
        policy="p",
        reference=None,
        beta=0.1,
        counts={"records": 1},
        left_out={},
        metrics={"m": Estimate(float("nan"), None, None, 1)},
        rewards=[{"reward": 0.5, "desirable": True}, {"reward": -0.5, "desirable": False}],
        samples=[{"prompt": "q", "completions": ["ä"]}],
    )
    write_results(tmp_path, first)
    found = json.loads((tmp_path / "evaluation.json").read_text())
    assert found["metrics"] == {"m": {"value": None, "low": None, "high": None, "n": 1}}
    assert not {"win_rate", "judge", "tasks"} & set(found)
    lines = [json.loads(line) for line in (tmp_path / "rewards.jsonl").read_text().splitlines()]
    assert lines == [{"reward": 0.5, "desirable": True}, {"reward": -0.5, "desirable": False}]
    assert (tmp_path / "samples.jsonl").read_text(encoding="utf-8") == '{"prompt": "q", "completions": ["ä"]}\n'
    assert not (tmp_path / "reliability.png").exists()  # there are no pairs
    won = WinRate(1, Estimate(1.0, 0.5, 1.0, 1), 0.5, [1.0, None])
    samples = [{"prompt": "q", "completions": ["ä"], "opponent": ["b"]}]
    write_results(tmp_path, replace(first, samples=samples, opponent="data", win_rate=won, judge={"cost": 0}))
    assert json.loads((tmp_path / "samples.jsonl").read_text())["opponent"] == ["b"]
    win_rate = json.loads((tmp_path / "evaluation.json").read_text())["win_rate"]
    assert win_rate["opponent"] == "data"
    assert [win_rate[key] for key in ("prompts", "value", "won", "lost", "without an answer")] == [1, 1.0, 1, 0, 1]
