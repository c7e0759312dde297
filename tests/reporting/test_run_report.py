"""What a run prints, read back as plain text."""

import io
import logging
import math
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from halos import terminal
from halos.data.rows.token_rows import Row
from halos.policy.loading import ModelSpec
from halos.reporting import data_report, run_report
from halos.sampling.before_after import Comparison, Samples
from halos.sampling.budget import SamplingPlan

Printed = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terminal.console, "_width", 200)


def test_counts_stand_in_one_column_for_each_split(capsys: Printed) -> None:
    data_report.show_data({"train": Counter({"records": 12000, "examples": 3}), "val": Counter({"empty": 2})})
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.strip(" ─")]
    assert lines == [["data", "train", "val"], ["records", "12,000", "0"], ["examples", "3", "0"], ["empty", "0", "2"]]


def test_exactly_the_completion_of_each_branch_is_marked_as_scored(capsys: Printed) -> None:
    tokenizer = ModelSpec(path="pkg://halos.toy/reference").tokenizer()
    prompt, *branches = (
        tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
        for text in ("<|user|> i bought a lamp. <|assistant|>", "happy to help. <|end|>", "go away. <|end|>")
    )
    data_report.show_example(Row("a[b].jsonl:3", 0, prompt, tuple(branches)), tokenizer, ("chosen", "rejected"))
    first, *rest = [line.strip() for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert "a[b].jsonl:3" in first
    shown = tokenizer.decode(list(prompt))
    assert rest == [
        f"{name}: {shown}⟦{tokenizer.decode(list(branch))}⟧"
        for name, branch in zip(("chosen", "rejected"), branches, strict=True)
    ]


def test_turns_of_others_in_a_completion_are_not_marked(capsys: Printed) -> None:
    tokenizer = ModelSpec(path="pkg://halos.toy/reference").tokenizer()
    texts = ("go away. <|end|>", "<|user|> i bought a lamp. <|assistant|>", "happy to help. <|end|>")
    turns = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    branch, start = tuple(turns[0] + turns[1] + turns[2]), len(turns[0])
    row = Row("r", 0, (1,), (branch,), context=(((start, start + len(turns[1])),),))
    data_report.show_example(row, tokenizer, ("completion",))
    said, asked, answered = map(tokenizer.decode, turns)
    shown = "".join(capsys.readouterr().out.splitlines()[1:]).replace(" ", "")
    assert f"⟦{said}⟧{asked}⟦{answered}⟧".replace(" ", "") in shown


class Markup:
    """A tokenizer whose texts look like rich's markup."""

    def decode(self, ids: tuple[int, ...]) -> str:
        return "".join("[bold]x[/] [a]"[i] for i in ids)


def test_text_that_looks_like_markup_is_printed_as_it_is(capsys: Printed) -> None:
    ids = tuple(range(14))
    data_report.show_example(Row("r", 0, ids, (ids,)), Markup(), ("completion",))  # type: ignore[arg-type]
    assert "completion: [bold]x[/] [a]⟦[bold]x[/] [a]⟧" in capsys.readouterr().out


class Evil:
    """A tokenizer of a stranger, whose texts end where rich's own escaping of markup does not hold."""

    def decode(self, ids: tuple[int, ...]) -> str:
        return "\x1b[2J\u202e a" + "\\" * 3


def test_a_text_that_ends_with_backslashes_is_printed_as_it_is(capsys: Printed) -> None:
    data_report.show_example(Row("r\x07[/b]", 0, (1,), ((2,),)), Evil(), ("completion",))  # type: ignore[arg-type]
    out = capsys.readouterr().out
    text = r"\x1b[2J\u202e a" + "\\" * 3
    assert f"completion: {text}⟦{text}⟧" in out
    assert r"One example (r\x07[/b]);" in out


PLAN = run_report.RunPlan(
    steps=1200,
    examples=3000,
    passes=12.803,
    batch_size=8,
    devices=2,
    accumulate=2,
    validations=5,
    validated=256,
    validation_share=0.104,
    output_dir="out/[/a]",
)


def printed(capsys: Printed, **changes: Any) -> dict[str, str]:
    run_report.show_plan(replace(PLAN, **changes))
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    return {line[:12].strip(): line[12:] for line in lines if line}


def test_the_plan_names_examples_passes_the_global_batch_validations_and_the_folder(capsys: Printed) -> None:
    assert printed(capsys) == {
        "data": "3,000 examples, 12.8 passes",
        "steps": "1,200 of 32 examples (8 a device × 2 devices × 2 micro-batches)",
        "validation": "5 times 256 examples, about 10% of training's computation",
        "output": "out/[/a]",
    }
    assert printed(capsys, passes=0.0125)["data"] == "3,000 examples, 0.013 passes"
    one = printed(capsys, passes=1.0, devices=1, accumulate=1, examples=1)
    assert (one["data"], one["steps"]) == ("1 example, 1 pass", "1,200 of 8 examples (8 a device × 1 device)")


def test_the_plan_of_a_stream_and_of_a_run_without_validation(capsys: Printed) -> None:
    lines = printed(capsys, examples=None, passes=None, validations=0)
    assert lines["data"] == "a stream"
    assert lines["validation"] == "none: data.val_size=200 would hold 200 records out"


def test_the_plan_names_the_step_from_which_a_run_goes_on(capsys: Printed) -> None:
    assert "resume" not in printed(capsys)
    assert printed(capsys, resumed=1060)["resume"] == "goes on from step 1,060"
    assert printed(capsys, nothing_to_resume=True)["resume"] == "there is no checkpoint yet: starts at step 0"


@pytest.mark.parametrize(
    ("plan", "expected"),
    [
        (SamplingPlan((0, 9), 5, 1024, True, 0.123), "2 times the KL on 1,024 prompts"),
        (SamplingPlan((9,), 5, 3, False, 0.123), "1 times replies to 3 prompts"),
        (SamplingPlan((), 0, 64, True, 0.123), "at the end the KL on 64 prompts"),
    ],
)
def test_the_plan_names_how_often_and_how_many(plan: SamplingPlan, expected: str, capsys: Printed) -> None:
    assert printed(capsys, sampling=plan)["sampling"] == f"{expected}, about 12% of training's computation"


@pytest.mark.parametrize("root", ["out/run", "out/[a]", "out/[/a]"])
def test_where_to_look_next(root: str, capsys: Printed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run_report.show_where_next(Path(root), Path(root) / "model")
    assert "tensorboard" not in capsys.readouterr().out  # as with logger=none
    Path(root, "tensorboard").mkdir(parents=True)
    run_report.show_where_next(Path(root), Path(root) / "model")
    out = capsys.readouterr().out
    assert f"tensorboard --logdir {root}\n" in out
    assert f"{root}/model\n" in out


def comparison(count: int) -> Comparison:
    prompts = [f"prompt {n} [b]" for n in range(count)]
    before = Samples([f"rude {n} [/b]" for n in range(count)], [0.25] * count, [False] * count)
    after = Samples([f"kind {n}" for n in range(count)], [1.0] * count, [True] + [False] * (count - 1))
    return Comparison(prompts, before, after, 1.234)


def test_the_comparison_shows_shares_rewards_and_at_most_three_replies(capsys: Printed) -> None:
    run_report.show_comparison(comparison(4))
    out = capsys.readouterr().out
    rows = {line.split("  ")[1].strip(): line.split() for line in out.splitlines() if line.startswith("  ")}
    assert rows["desirable by the true reward"][-2:] == ["0.0%", "25.0%"]
    assert rows["mean true reward"][-2:] == ["0.250", "1.000"]
    assert "4 held-out prompts" in out
    assert [f"prompt {n} [b]" in out for n in range(4)] == [True, True, True, False]
    assert "✗ rude 0 [/b]" in out
    assert "✓ kind 0" in out
    assert "✗ kind 1" in out


def test_the_comparison_of_a_single_prompt(capsys: Printed) -> None:
    run_report.show_comparison(comparison(1))
    assert "✓ kind 0" in capsys.readouterr().out


def test_start_best_and_final_metrics_are_a_table_that_begins_with_rewards_and_one_kl(capsys: Printed) -> None:
    sampled = {"kl": 1.5, "kl_per_token": 0.1, "kl_error": 0.25}
    validations = [
        (0, {"logps/chosen": -9.0, "rewards/chosen": -4e-5, "loss": 0.9, "kl": -1e-4, "kl_per_token": 0.0}),
        (4, {"logps/chosen": -8.0, "rewards/chosen": 0.75, "loss": 0.123456}),
        (8, {"logps/chosen": -7.5, "rewards/chosen": -1.0, "loss": 0.2, **sampled}),
    ]
    run_report.show_metrics(validations)
    lines = [re.split("  +", line.strip()) for line in capsys.readouterr().out.splitlines() if line.strip(" ─")]
    assert lines == [
        ["start", "best", "final"],
        ["validation", "step 0", "step 4", "step 8"],
        ["rewards/chosen", "0.0000", "0.7500", "-1.0000"],
        ["kl (nats)", "0.00", "–", "1.50 ± 0.25"],
        ["loss", "0.9000", "0.1235", "0.2000"],
        ["logps/chosen (nats)", "-9.0000", "-8.0000", "-7.5000"],
    ]


def test_without_a_validation_the_table_is_a_hint(capsys: Printed) -> None:
    run_report.show_metrics([])
    assert capsys.readouterr().out == "validation: none: data.val_size=200 would hold 200 records out\n"


def test_a_lone_validation_is_the_final_one_and_a_loss_that_is_no_number_is_never_the_best(capsys: Printed) -> None:
    run_report.show_metrics([(8, {"loss": 0.2})])
    assert capsys.readouterr().out.split()[:4] == ["final", "validation", "step", "8"]
    run_report.show_metrics([(0, {"loss": math.nan}), (4, {"loss": 0.3}), (8, {"loss": 0.2})])
    assert capsys.readouterr().out.split()[:10] == [
        *["start", "best", "final", "validation", "step", "0", "step", "8", "step", "8"]
    ]
    run_report.show_metrics([(0, {"loss": 0.5}), (4, {"loss": 0.3}), (8, {"loss": 0.2})], 4)
    assert capsys.readouterr().out.split()[:10] == [
        *["start", "best", "final", "validation", "step", "0", "step", "4", "step", "8"]
    ]


def test_rounds_are_a_table_with_the_numbers_that_there_are(capsys: Printed) -> None:
    samples = {"policy_desirable": 0.9, "policy_reward": 0.95}
    run_report.show_rounds(
        {
            0: {"loss": "sft", "metrics": {"loss": 1.23456}},
            1: {"loss": "kto", "metrics": {"loss": 0.4, "rewards/auc": 0.75, "kl": 0.5}, "samples": samples},
            2: {},
        }
    )
    lines = [re.split("  +", line.strip()) for line in capsys.readouterr().out.splitlines() if line.strip(" ─")]
    assert lines == [
        ["round", "trained with", "loss", "AUC", "KL", "desirable", "true reward"],
        ["0", "sft", "1.23", "–", "–", "–", "–"],
        ["1", "kto", "0.4", "0.75", "0.5", "0.9", "0.95"],
        ["2", "–", "–", "–", "–", "–", "–"],
    ]


def test_what_is_logged_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    root, stream = logging.getLogger(), io.StringIO()
    monkeypatch.setattr(root, "handlers", [*root.handlers, logging.StreamHandler(stream)])  # as Hydra's
    terminal.set_up_logging()
    assert logging.getLogger("huggingface_hub").handlers  # which print its messages, such as those of retries
    for name in ("halos.commands.train", "halos", "hydra", "halosque", "huggingface_hub.utils"):
        logging.getLogger(name).warning("from %s", name)
    assert stream.getvalue() == "from hydra\nfrom halosque\n"
