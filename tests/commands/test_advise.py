"""``scripts/advise.py``: its rules, what they rest on, and what it says of data."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from halos.cli import COMMANDS
from halos.commands.advice import RULES, STEPS, Case, Paper, Rule, fitting
from halos.commands.advise import advise, described
from halos.data.preparation.facts import Facts
from scripts.write_docs import DOCS
from tests.commands.test_evaluate import compose
from tests.configs import compose as compose_run

ROOT = Path(__file__).parents[2]
LABELS = Facts(records=9, prompts=9, completions=9, desirable=4, undesirable=5, judgements=9)
PAIRS = Facts(records=9, prompts=9, completions=18, pairs=9, judgements=9, longer=0.5)
SCORES = Facts(records=9, prompts=9, completions=18, scored=18, score_groups=9)
CASES = {
    "labels": Case(facts=LABELS),
    "labels, both kinds for a prompt": Case(facts=Facts(desirable=4, undesirable=3, both_kinds=2)),
    "labels without a reference": Case(facts=LABELS, reference=False, sft=False),
    "pairs": Case(facts=PAIRS, sft=True),
    "pairs without SFT": Case(facts=PAIRS, sft=False),
    "pairs without a reference": Case(facts=PAIRS, reference=False),
    "pairs of others": Case(facts=PAIRS, writer="others"),
    "disputed pairs": Case(facts=Facts(pairs=9, repeated=8, disputed=2, judgements=9)),
    "certain pairs": Case(facts=Facts(pairs=9, repeated=8, judgements=9)),
    "pairs with margins": Case(facts=Facts(pairs=9, margins=9, judgements=9)),
    "pairs with longer chosen replies": Case(facts=Facts(pairs=9, longer=0.7, judgements=9)),
    "scores": Case(facts=SCORES),
    "scores of the policy's replies": Case(facts=SCORES, writer="policy"),
    "labels of steps": Case(facts=Facts(records=9, prompts=9, completions=9, steps=30)),
    "pairs and labels": Case(facts=Facts(pairs=9, desirable=4, undesirable=5, judgements=18)),
    "pairs and demonstrations": Case(facts=Facts(pairs=9, bare=3, judgements=9), sft=True),
    "demonstrations": Case(facts=Facts(records=3, completions=3, bare=3)),
    "desirable replies alone": Case(facts=Facts(records=3, completions=3, desirable=3, judgements=3)),
    "undesirable replies alone": Case(facts=Facts(records=3, completions=3, undesirable=3, judgements=3)),
}
FITTING = {
    "labels": "kto kto_balanced bco halo",
    "labels, both kinds for a prompt": "kto bco halo dpo",
    "labels without a reference": "csft kto_reference_free",
    "pairs": "dpo kto bradley_terry",
    "pairs without SFT": "dpo kto orpo bradley_terry",
    "pairs without a reference": "simpo orpo cpo bradley_terry",
    "pairs of others": "dpo kto wpo bradley_terry",
    "disputed pairs": "dpo kto robust_dpo bradley_terry",
    "certain pairs": "dpo kto ipo bradley_terry",
    "pairs with margins": "dpo kto dpo bradley_terry",
    "pairs with longer chosen replies": "dpo kto r_dpo ld_dpo dpo_norm bradley_terry",
    "scores": "infonca dpo kto",
    "scores of the policy's replies": "infonca dpo grpo ppo kto",
    "labels of steps": "step_kto",
    "pairs and labels": "kto kto_balanced bco halo dpo bradley_terry mix",
    "pairs and demonstrations": "dpo kto bradley_terry mix sft",
    "demonstrations": "sft",
    "desirable replies alone": "sft",
    "undesirable replies alone": "",
}


def losses(words: dict[str, list[tuple[str, Rule]]]) -> list[str]:
    return [own.split()[0].partition("=")[2] for own in words]


@pytest.mark.parametrize("name", CASES)
def test_the_losses_that_fit_are_those_that_take_the_feedback(name: str) -> None:
    assert losses(fitting(CASES[name])) == FITTING[name].split()


@pytest.mark.parametrize("rule", [*RULES, *STEPS], ids=lambda rule: rule.words)
def test_each_rule_applies_to_some_cases_and_not_to_others(rule: Rule) -> None:
    assert len({rule.when(case) for case in CASES.values()}) == 2


@pytest.mark.parametrize("rule", [*RULES, *STEPS], ids=lambda rule: rule.words)
def test_the_words_of_a_rule_are_those_of_a_run(rule: Rule) -> None:
    name = next(name for name, case in CASES.items() if rule.when(case))
    for words in fitting(CASES[name], (rule,)):
        compose_run(*words.split())


@pytest.mark.parametrize("rule", [*RULES, *STEPS], ids=lambda rule: rule.words)
def test_each_rule_cites_what_the_documentation_has(rule: Rule) -> None:
    assert rule.rests_on
    papers = "".join((DOCS / page).read_text(encoding="utf-8") for page in ("reference/papers.md", "weights.md"))
    name = rule.words.split()[0].partition("=")[2]
    for source in rule.rests_on:
        if isinstance(source, Paper):
            assert source.number in papers
            continue
        text = (DOCS / source.path).read_text(encoding="utf-8")
        if source.path == "losses/index.md":  # the row of this loss, and the reference's share below the table
            row = next(line for line in text.splitlines() if line.startswith(f"| [`{name}`]"))
            text = row + text.rpartition("\n| ")[2].partition("\n\n")[2]
        numbers = re.findall(r"[+−]?\d+\.\d+", source.result)
        assert [number for number in numbers if number not in text] == []
        assert numbers or source.result in text


def test_a_reason_is_given_once_for_each_rule_with_the_same_words() -> None:
    (because, _), (second, rule) = fitting(CASES["disputed pairs"])["loss=kto"]
    assert because == "takes both replies of a pair as labelled ones"
    assert second.startswith("its gradient vanishes")
    assert str(rule.rests_on[1]).startswith("docs/results/claims.md: against DPO with a fifth")
    assert "loss=robust_dpo loss.label_smoothing=0.15" in fitting(CASES["disputed pairs"])


def test_contradictions_are_a_bound_and_an_estimate_of_noise() -> None:
    lines = dict(described(CASES["disputed pairs"]))
    assert lines["noise"] == (
        "at least 2 of 9 judgements (22.2%) are wrong if each question has one right answer; 2 of 8 repeated ones "
        "were answered both ways: each is wrong with probability 0.15 (0.037 to 0.5) if errors are independent"
    )
    assert dict(described(CASES["pairs"]))["noise"].startswith("no judgement is repeated")


def written(folder: Path, *rows: dict) -> str:
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(file)


def test_the_command_prints_data_losses_and_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = written(tmp_path, {"prompt": "q", "chosen": "a", "rejected": "b"})
    assert advise(compose("advise", f"data.train={file}", "sft=false")) == [
        "loss=dpo",
        "loss=kto",
        "loss=orpo",
        "loss=bradley_terry",
    ]
    printed = capsys.readouterr().out
    for line in (
        "feedback 1 pairs",
        "stated   SFT not done; replies by whom is not stated (writer=policy or others); a reference",
        "    arXiv 2305.18290, section 4",
        "before=sft, next to the words of a loss",
    ):
        assert line in printed.splitlines()


def test_data_that_no_loss_takes_are_said_to_be_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = written(tmp_path, {"prompt": "q", "completion": "a", "label": False})
    assert advise(compose("advise", f"data.train={file}")) == []
    printed = capsys.readouterr().out
    assert "balance  all of one kind: 0 desirable" in printed
    assert "No loss fits" in printed


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("sft=perhaps", "sft: expected true or false or null, found 'perhaps'"),
        ("reference=null", "reference: expected true or false, found None"),
        ("writer=me", "writer: expected one of policy, others; found 'me'"),
        ("data.streaming=true", "data.streaming: expected false, as all feedback is counted; found true"),
    ],
)
def test_settings_that_make_no_sense_are_refused(tmp_path: Path, words: str, message: str) -> None:
    file = written(tmp_path, {"prompt": "q", "chosen": "a", "rejected": "b"})
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        advise(compose("advise", f"data.train={file}", words))


@pytest.mark.long
def test_neither_torch_nor_lightning_is_imported(tmp_path: Path) -> None:
    file = written(tmp_path, {"prompt": "q", "chosen": "a", "rejected": "b"})
    heavy = "[m for m in ('torch', 'lightning', 'transformers', 'scipy') if m in sys.modules]"
    words = f"['advise', 'data.train={file}', 'writer=others']"
    code = f"import sys; sys.argv = {words}; from halos.cli import main_command; main_command('advise'); print({heavy})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
    # The words of the data, without this command's own.
    assert f"  python scripts/train.py loss=wpo data.train={file} model.path=MODEL" in done.stdout.splitlines()
    assert "advise" in COMMANDS
