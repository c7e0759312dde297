"""Rounds: each from the last one's policy and its judged samples; gone on with where they stopped, or refused."""

from __future__ import annotations

import csv
import json
import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig, OmegaConf

from halos.commands import rounds
from halos.commands.rounds import round_config, run_rounds
from halos.commands.train import train
from halos.comparison.runs import group, read_runs
from halos.toy.model import REFERENCE_DIR
from halos.toy.people import is_good
from tests.configs import compose

QUICK = (
    "experiment=iterative",
    "data.source.size=12",
    "data.source.val_size=4",
    "data.batch_size=4",
    "rounds.count=2",
    "rounds.samples=3",
    "sampling.size=0",
    "sampling.prompts=0",
    "logger=none",
    "trainer.val_check_interval=1.0",
    "trainer.accelerator=cpu",
    "trainer.enable_progress_bar=false",
)


class Trained:
    """Stands for training: leaves the toy reference as the policy, and notes the configurations."""

    def __init__(self, fail: int | None = None) -> None:
        self.configs: list[DictConfig] = []
        self.fail = fail

    def __call__(self, cfg: DictConfig) -> None:
        if cfg.rounds.round == self.fail:
            raise RuntimeError("killed")
        self.configs.append(cfg)
        folder = Path(cfg.output_dir)
        shutil.copytree(REFERENCE_DIR, folder / "model", dirs_exist_ok=True)
        OmegaConf.save(cfg, folder / "config.yaml")
        (folder / "summary.json").write_text("{}")

    @property
    def rounds(self) -> list[int]:
        return [cfg.rounds.round for cfg in self.configs]


def records(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def validations(folder: Path, name: str) -> list[float]:
    with (folder / "metrics.csv").open(newline="") as stream:
        return [float(row[name]) for row in csv.DictReader(stream) if row.get(name)]


@pytest.mark.runs
@pytest.mark.parametrize("reference", [pytest.param("last", marks=pytest.mark.slow), "first"])
def test_a_round_starts_from_the_last_policy_against_the_reference_that_was_chosen(
    reference: str, tmp_path: Path
) -> None:
    last = run_rounds(compose(*QUICK, f"output_dir={tmp_path}", f"rounds.reference={reference}"), train)
    assert last == tmp_path / "round2"
    # The same held-out data in both rounds: what the policy of round 1 ended with, round 2 starts from.
    ended = {name: validations(tmp_path / "round1", name)[-1] for name in ("val/logps/chosen", "val/log_ratio/chosen")}
    started = {name: validations(last, name)[0] for name in ended}
    assert started["val/logps/chosen"] == pytest.approx(ended["val/logps/chosen"], abs=1e-4)
    from_first = ended["val/log_ratio/chosen"]
    assert abs(from_first) > 0.01
    expected = 0.0 if reference == "last" else from_first
    assert started["val/log_ratio/chosen"] == pytest.approx(expected, abs=1e-4)
    first_loss = json.loads((last / "summary.json").read_text())["train_loss"][0]
    assert (first_loss == pytest.approx(0.5, abs=1e-6)) == (reference == "last")


@pytest.mark.parametrize(
    ("words", "references"),
    [
        (("rounds.reference=last", "model.reference_path=x"), ["x", None, None]),
        (("rounds.reference=first", "model.reference_path=x"), ["x", "x", "x"]),
        (("rounds.reference=first", "model.reference_path=x", "model.random_weights=true"), ["x", "x", "x"]),
        (("rounds.reference=first", "model.path=y"), [None, "y", "y"]),
        (("rounds.reference=first", "before=sft", "model.random_weights=true"), [None, *["out/round0/model"] * 2]),
    ],
)
def test_the_reference_of_later_rounds_is_what_they_start_from_or_that_of_round_1(
    words: tuple[str, ...], references: list[str | None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    cfg = compose(*QUICK, "output_dir=out", *words)
    assert [round_config(cfg, number).model.reference_path for number in (1, 2, 3)] == references
    with pytest.raises(RuntimeError, match="killed"):  # nothing is wrong with it
        run_rounds(cfg, Trained(fail=0 if cfg.get("before") else 1))


@pytest.mark.long
def test_what_a_round_learns_from_are_the_judges_labels_of_the_last_policys_samples(tmp_path: Path) -> None:
    trained = Trained()
    run_rounds(compose(*QUICK, f"output_dir={tmp_path}", "rounds.count=3"), trained)
    assert trained.rounds == [1, 2, 3]
    for number in (2, 3):
        samples = records(tmp_path / f"round{number}" / "samples.jsonl")
        feedback = records(tmp_path / f"round{number}" / "feedback.jsonl")
        assert len(samples) == len(feedback) == 12
        assert all(len(row["completions"]) == 3 for row in samples)
        for row in feedback:
            turn = row["prompt"] if isinstance(row["prompt"], str) else row["prompt"][-1]["content"]
            assert all(c["desirable"] == is_good(turn, c["text"]) for c in row["completions"])
        cfg = trained.configs[number - 1]
        assert cfg.model.path == str(tmp_path / f"round{number - 1}" / "model")
        assert cfg.data.source.feedback == str(tmp_path / f"round{number}" / "feedback.jsonl")


@pytest.mark.long
def test_a_stopped_command_goes_on_where_it_was_and_may_add_rounds(tmp_path: Path) -> None:
    words = (*QUICK, f"output_dir={tmp_path}")
    with pytest.raises(RuntimeError, match="killed"):
        run_rounds(compose(*words), Trained(fail=2))
    before = (tmp_path / "round2" / "feedback.jsonl").stat().st_mtime_ns
    with pytest.raises(ValueError, match=r"output_dir: .* holds other rounds; .* resume=auto"):
        run_rounds(compose(*words), Trained())
    again = Trained()
    run_rounds(compose(*words, "resume=auto", "rounds.count=3"), again)
    assert again.rounds == [2, 3]
    assert (tmp_path / "round2" / "feedback.jsonl").stat().st_mtime_ns == before
    assert all(cfg.resume == "auto" for cfg in again.configs)
    with pytest.raises(ValueError, match=r"resume: .*: loss.beta was 0.5, found 0.2"):
        run_rounds(compose(*words, "resume=auto", "loss.beta=0.2"), Trained())
    over = Trained()
    run_rounds(compose(*words, "overwrite=true", "loss.beta=0.2"), over)
    assert over.rounds == [1, 2]


@pytest.mark.long
def test_the_judge_and_the_sampling_may_be_corrected_until_a_round_has_feedback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = (*QUICK, f"output_dir={tmp_path}")

    def fail(*_: object) -> None:
        raise RuntimeError("no judge")

    monkeypatch.setattr("halos.commands.rounds.label", fail)
    with pytest.raises(RuntimeError, match="no judge"):
        run_rounds(compose(*words), Trained())
    samples = tmp_path / "round2" / "samples.jsonl"
    drawn = samples.stat().st_mtime_ns
    monkeypatch.setattr("halos.commands.round_checks.make_judge", lambda *_, **__: None)
    with pytest.raises(RuntimeError, match="no judge"):
        run_rounds(compose(*words, "resume=auto", "+judge.threshold=0.5"), Trained())
    assert samples.stat().st_mtime_ns == drawn  # another judge is asked about the same samples
    monkeypatch.undo()
    trained = Trained()
    run_rounds(compose(*words, "resume=auto", "rounds.samples=2"), trained)
    assert trained.rounds == [2]
    assert {len(row["completions"]) for row in records(samples)} == {2}
    with pytest.raises(ValueError, match=r"resume: .*: rounds.samples was 2, found 3"):
        run_rounds(compose(*words, "resume=auto"), Trained())


@pytest.mark.long
def test_sampling_goes_on_whether_or_not_progress_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = (*QUICK, f"output_dir={tmp_path}")
    with monkeypatch.context() as patched:
        patched.setattr("halos.commands.rounds.label", lambda _: None)
        run_rounds(compose(*words), Trained())
    shutil.rmtree(tmp_path / "round2" / "model")
    (tmp_path / "round2" / "summary.json").unlink()
    trained = Trained()
    run_rounds(compose(*words, "resume=auto", "trainer.enable_progress_bar=true"), trained)
    assert trained.rounds == [2]


def test_a_round_of_sft_before_takes_its_own_loss_and_settings_and_leaves_the_others_alone(tmp_path: Path) -> None:
    trained = Trained()
    words = ("rounds.count=1", "before=sft", "+before.optim.lr=0.5", "+claim.name=x", "hub.push=a/b")
    run_rounds(compose(*QUICK, f"output_dir={tmp_path}", *words), trained)
    sft, kto = trained.configs
    assert (sft.loss, sft.optim.lr, sft.claim) == ({"_target_": "halos.objectives.SFT", "name": "sft"}, 0.5, None)
    assert (kto.loss.name, kto.optim.lr, kto.claim) == ("kto", 0.005, {"name": "x"})
    assert (sft.hub.push, kto.hub.push) == (None, "a/b")
    assert sft.model.path != kto.model.path == str(tmp_path / "round0" / "model")
    assert sft.data == kto.data


@pytest.mark.long
def test_rounds_of_one_command_are_told_apart_by_their_number_alone(tmp_path: Path) -> None:
    for seed in (0, 1):
        run_rounds(
            compose(*QUICK, f"output_dir={tmp_path}/{seed}", f"seed={seed}", "rounds.reference=first"), Trained()
        )
    groups = group(read_runs([str(tmp_path)])[0])
    assert {g.label: len(g.runs) for g in groups} == {"kto, rounds.round=1": 2, "kto, rounds.round=2": 2}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("~judge",), "judge: expected judge=truth"),
        (("loss=bradley_terry",), "rounds: expected a loss whose policy can be sampled, found bradley_terry"),
        (("rounds.count=0",), "rounds.count: expected a whole number from 1 on, found 0"),
        (("rounds.reference=none",), "rounds.reference: expected one of last, first; found 'none'"),
        (("rounds.feedback=likes",), "rounds.feedback: expected one of binary, pairs, scores; found 'likes'"),
        (("rounds.top_p=0",), "rounds.top_p: expected"),
        (("rounds.samples=0",), "rounds.samples: expected a whole number from 1 on, found 0"),
        (("rounds.prompts=0",), "rounds.prompts: expected a whole number from 1 on or null, found 0"),
        (("rounds.batch_size=0.5",), "rounds.batch_size: expected a whole number from 1 on, found 0.5"),
        (("rounds.engine=vlm",), "rounds.engine: expected transformers or vllm, found 'vlm'"),
        (("judge=reward_model", "judge.path=/no/rm"), "judge.path: /no/rm could not be loaded as a classifier"),
        (("loss.beta=-1", "rounds.count=1", "before=sft"), "beta: expected"),
        (("before=sft", "humanline.enabled=true"), "humanline.enabled: expected false, or a loss with a reference"),
        (("rounds.feedback=scores",), "rounds.feedback: expected feedback that loss=kto .* set a threshold"),
        (("loss=dpo", "rounds.feedback=pairs", "rounds.samples=1"), "rounds.samples: expected at least 2, .* found"),
        (("loss=dpo", "rounds.samples=1"), "rounds.feedback: .* loss=dpo .* binary of 1 different .* needs pairs"),
        (("loss=dpo", "rounds.temperature=0"), "rounds.feedback: .* loss=dpo .* binary of 1 different"),
        (("resume=some.ckpt",), "resume: expected auto with rounds"),
        (("rounds.reference=first", "model.reference=live"), "model.reference: expected auto or cached .*, found live"),
        (("rounds.reference=first", "model.random_weights=true"), "rounds.reference: expected last with .*, found fir"),
        (("model.dropout=2",), "model.dropout: expected"),
        (("model=toy_lora", "model.lora.export=adapter"), "model.lora.export: expected merged with rounds"),
        (("model=toy_lora", "model.lora.path=a"), "model.lora.path: expected null with rounds, found a.* merge it"),
        (("model=toy_lora", "model.lora.path=a", "rounds.count=1", "before=sft"), "model.lora.path: expected null"),
    ],
)
def test_mistakes_are_found_before_the_first_round(words: tuple[str, ...], said: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=said):
        run_rounds(compose(*QUICK, f"output_dir={tmp_path}", *words), lambda _: pytest.fail("trained"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "words",
    [
        ("loss=dpo", "rounds.feedback=scores", "data.select.min_margin=3"),
        ("rounds.feedback=scores", "rounds.samples=1", "data.select.labels_from_scores=median"),
        ("rounds.feedback=pairs",),
        ("loss=grpo",),
        ("loss=csft", "rounds.samples=1"),
        ("loss=sft", "rounds.feedback=scores"),
    ],
)
def test_feedback_that_a_loss_can_learn_from_is_taken(words: tuple[str, ...], tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="killed"):
        run_rounds(compose(*QUICK, f"output_dir={tmp_path}", *words), Trained(fail=1))


@pytest.mark.long
@pytest.mark.parametrize("word", ["overwrite=false", "overwrite=true", "resume=auto"])
def test_runs_that_other_commands_left_are_neither_taken_for_rounds_nor_removed(word: str, tmp_path: Path) -> None:
    cfg = compose(*QUICK, f"output_dir={tmp_path}", word)
    for name in ("round1", "round2", "roundabout"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "summary.json").write_text("{}")
    with pytest.raises(ValueError, match=r"output_dir: expected rounds.yaml next to the rounds in .*, found round1"):
        run_rounds(cfg, lambda _: pytest.fail("trained"))
    assert (tmp_path / "round1" / "summary.json").is_file()
    for name in ("round1", "round2"):
        shutil.rmtree(tmp_path / name)
    run_rounds(cfg, Trained())
    assert (tmp_path / "roundabout").is_dir()


def test_rounds_are_not_mistaken_for_a_run_nor_started_by_each_rank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = compose(*QUICK, f"output_dir={tmp_path}")
    with pytest.raises(ValueError, match=r"rounds: expected run_rounds"):
        train(cfg)
    (tmp_path / "config.yaml").write_text("")
    with pytest.raises(ValueError, match=r"output_dir: .* holds another run"):
        run_rounds(cfg, Trained())
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(ValueError, match="rounds: expected one process"):
        run_rounds(cfg, Trained())


def test_a_gpu_is_left_to_the_next_round(monkeypatch: pytest.MonkeyPatch) -> None:
    class Model:
        """Refers to itself, as modules with hooks do, so that only the garbage collector frees it."""

        def __init__(self) -> None:
            self.itself = self

    model = weakref.ref(Model())
    freed: list[bool] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: freed.append(model() is None))
    rounds._free_gpu()
    assert freed == [True]  # first the tensors, then the memory that PyTorch keeps
