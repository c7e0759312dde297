"""The KL of a run: the same whatever holds the reference, left out where there is none, and not too expensive."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

import halos.reporting.kl_reference
from halos.commands.replies import _win_rate_judge
from halos.judges.base import CompletionJudge, PromptCompletion
from halos.judges.chat import ChatJudge
from tests.configs import compose
from tests.train_runs import LABELS, LORA, column, jsonl, run

pytestmark = pytest.mark.runs

WORDS = ("trainer.max_steps=3", "optim.lr=1e-2", "optim.eps=1e-6", "sampling.kl=auto", "sampling.validations=9")


@pytest.mark.parametrize(
    ("words", "places"), [((), ("cached", "live")), (LORA, ("adapter", "live"))], ids=["all weights", "lora"]
)
def test_it_is_the_same_whatever_holds_the_reference(
    words: tuple[str, ...], places: tuple[str, str], tmp_path: Path
) -> None:
    found = []
    for place in places:
        folder = tmp_path / place
        metrics = run(folder, *WORDS, *words, f"model.reference={place}", f"cache_dir={folder}/cache")["metrics"]
        start, end = column(folder, "val/kl").values()
        assert start == pytest.approx(0, abs=1e-6)
        assert end == metrics["kl"] > 1e-4
        found.append({name: metrics[name] for name in ("kl", "kl_per_token", "kl_error", "samples/length")})
    assert found[0] == pytest.approx(found[1], rel=1e-3)


def test_a_loss_without_a_reference_is_compared_with_its_start(tmp_path: Path) -> None:
    run(tmp_path, *WORDS, "loss=sft")
    start, end = column(tmp_path, "val/kl").values()
    assert start == 0
    assert end > 1e-4


def test_without_held_out_data_the_end_is_measured_on_training_prompts(tmp_path: Path) -> None:
    file = tmp_path / "train.jsonl"
    file.write_text(jsonl(*LABELS))
    words = ("data=files", f"data.train={file}", "data.max_length=64", "data.batch_size=1", "trainer.max_epochs=4")
    metrics = run(tmp_path / "run", *WORDS, *words)["metrics"]
    assert metrics["kl"] > 1e-4
    assert column(tmp_path / "run", "val/kl") == {3: metrics["kl"]}


def test_random_weights_that_are_not_kept_have_none(tmp_path: Path) -> None:
    random = ("model.random_weights=true", "trainer.max_steps=1")
    assert "kl" not in run(tmp_path / "auto", *WORDS, *random)["metrics"]
    with pytest.raises(ValueError, match=r"^sampling.kl: expected auto or false with model.random_weights=true"):
        run(tmp_path / "true", *WORDS, *random, "sampling.kl=true")


def test_a_reference_that_does_not_fit_is_left_out_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(halos.reporting.kl_reference, "_free_bytes", lambda device: 1000.0)
    with caplog.at_level(logging.WARNING):
        metrics = run(tmp_path, *WORDS)["metrics"]
    assert "kl" not in metrics
    assert metrics["samples/length"] > 0
    lines = [record.getMessage() for record in caplog.records if "sampling.kl" in record.getMessage()]
    assert len(lines) == 1
    assert "MiB for the reference, found 0 free on cpu" in lines[0]


def test_the_configuration_says_how_many_validations_sample(tmp_path: Path) -> None:
    words = ("trainer.max_steps=6", "trainer.val_check_interval=1")
    run(tmp_path / "auto", *WORDS, *words, "sampling.validations=auto")
    config = yaml.safe_load((tmp_path / "auto" / "config.yaml").read_text())
    # A few short examples do not pay for more than the last.
    assert config["sampling"]["validations"] == 1
    assert list(column(tmp_path / "auto", "val/kl")) == [6]
    run(tmp_path / "three", *WORDS, *words, "sampling.validations=3")
    assert list(column(tmp_path / "three", "val/kl")) == [0, 3, 6]


# The win rate


def test_the_true_reward_judges_the_replies_where_it_is_known(tmp_path: Path) -> None:
    run(tmp_path / "auto", *WORDS)
    first, last = column(tmp_path / "auto", "val/samples/win_rate").values()
    assert first == 0.5
    run(tmp_path / "truth", *WORDS, "sampling.win_rate=true", "judge=truth")
    assert [*column(tmp_path / "truth", "val/samples/win_rate").values()] == [first, last]
    assert "samples/win_rate" not in run(tmp_path / "false", *WORDS, "sampling.win_rate=false")["metrics"]


class Longest(CompletionJudge):
    """Likes the longest reply, and has no answer to some."""

    def scores(self, completions: Sequence[PromptCompletion]) -> list[float | None]:
        return [float(len(str(reply))) if "lamp" not in str(prompt) else None for prompt, reply in completions]


def test_a_judge_that_is_set_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    verdicts = Longest.verdicts
    monkeypatch.setattr(Longest, "verdicts", lambda self, duels: asked.append(len(duels)) or verdicts(self, duels))
    words = (f"+judge._target_={__name__}.Longest", "sampling.kl_prompts=3")
    run(tmp_path, *WORDS, *words)
    assert asked == [3, 3]
    assert next(iter(column(tmp_path, "val/samples/win_rate").values())) == 0.5


@pytest.mark.parametrize("words", [("rounds.count=2", "rounds.round=1"), ("sampling.win_rate=false",)])
def test_the_judge_of_rounds_is_asked_on_request_alone(words: tuple[str, ...], tmp_path: Path) -> None:
    config = compose(*words, "judge=chat", "judge.model=x", f"output_dir={tmp_path}")
    source = SimpleNamespace(true_reward=lambda: None)
    assert _win_rate_judge(config, source) is None  # type: ignore[arg-type]
    if "rounds.count=2" in words:
        config.sampling.win_rate = True
        assert isinstance(_win_rate_judge(config, source), ChatJudge)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ("sampling.win_rate=true",),
            "sampling.win_rate: expected auto or false without a judge, found true; set judge",
        ),
        (
            ("sampling.win_rate=true", "judge=truth", "sampling.kl=false"),
            "sampling.win_rate: expected auto or false with",
        ),
        (("sampling.win_rate=maybe",), "sampling.win_rate: expected auto, true or false, found 'maybe'"),
    ],
)
def test_a_win_rate_that_cannot_be_is_refused(words: tuple[str, ...], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        run(tmp_path, *WORDS, *words)
