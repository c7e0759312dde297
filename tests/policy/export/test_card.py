"""Model cards: they name what trained the model, survive hostile configurations, and their code runs."""

from __future__ import annotations

import inspect
import re
from importlib import metadata
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import yaml

from halos import objectives
from halos.objectives import Objective
from halos.policy.backbone import Backbone
from halos.policy.export.card import ModelCard, Usage, inline_code, rounded, table_cell
from halos.policy.export.language_model import export_policy
from halos.policy.export.reward_model import export_reward_model
from halos.policy.heads import RewardHead
from halos.policy.lora import LoRA
from tests import tiny

CHAT = Usage(chat=True)
HOSTILE = [
    'x\n---\nlicense: mit\n# y: "z"',
    "a | b \\| c",
    "`` ` ``` code",
    "<script>alert(1)</script>",
    "{{ 7 * 7 }}{% raw %}",
    "  ",
    "'\"\\",
    "![i](https://e.org) [t](javascript:x)",
    "```\n```python\nimport os",
    "a: b # c",
    "é 漢 \x07 …",
]


def front_matter(card: str) -> dict[str, Any]:
    before, _, _ = card.removeprefix("---\n").partition("\n---\n")
    return dict(yaml.safe_load(before))


def code_of(card: str) -> str:
    (code,) = re.findall(r"^```python\n(.*?)^```$", card, flags=re.DOTALL | re.MULTILINE)
    return str(code)


def tables(card: str) -> list[list[str]]:
    """The cells of each row, split as GitHub's Markdown does: by bars that no backslash escapes."""
    rows = [line for line in card.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in re.findall(r"((?:\\.|[^|\\])+)", row)] for row in rows]


@pytest.mark.parametrize("name", ["KTO", "DPO", "SFT", "CSFT"])
def test_a_metric_named_loss_does_not_take_the_place_of_the_losses_name(name: str) -> None:
    kind: type[Objective] = getattr(objectives, name)
    paper = kind.paper or ("A title", "https://arxiv.org/abs/1234.56789")
    metrics = {"loss": 0.26140938, "rewards/auc": 0.75, "steps": 12345.6}
    card = ModelCard(loss=name.lower(), base="Org/model", paper=paper, metrics=metrics).render(CHAT)
    assert f"# Language model from `Org/model`, trained with the loss `{name.lower()}`\n" in card
    assert front_matter(card)["tags"] == ["alignment", "halos", name.lower()]
    assert f"(<{paper[1]}>)" in card
    assert ["`loss`", "0.2614"] in tables(card)
    assert ["`rewards/auc`", "0.75"] in tables(card)
    assert ["`steps`", "12350"] in tables(card)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0.26140938, "0.2614"),
        (-0.00012344, "-0.0001234"),
        (99999.0, "100000"),
        (1e-9, "1e-09"),
        (3, "3"),
        (0.0, "0"),
        (float("nan"), "nan"),
    ],
)
def test_numbers_have_four_significant_digits(value: float, expected: str) -> None:
    assert rounded(value) == expected


def test_settings_versions_and_date_are_on_the_card() -> None:
    settings = {"loss.beta": 0.1, "optim.lr": 5e-6, "model.chat_template": "x" * 200}
    card = ModelCard(loss="kto", base="b", hyperparameters=settings, date="2026-01-02").render(CHAT)
    cells = tables(card)
    assert ["`loss.beta`", "`0.1`"] in cells
    assert ["`optim.lr`", "`5e-06`"] in cells
    assert ["`model.chat_template`", f"`{'x' * 79}…`"] in cells
    for name in ("halos", "torch", "transformers", "lightning"):
        assert [f"`{name}`", f"`{metadata.version(name)}`"] in cells
    assert ", on 2026-01-02 by halos." in card


def test_a_program_that_is_run_from_its_sources_has_a_card_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if name == "halos":
            raise metadata.PackageNotFoundError(name)
        return "1.0"

    monkeypatch.setattr(metadata, "version", version)
    assert set(ModelCard().versions) == {"torch", "transformers", "lightning"}


def test_a_card_without_results_has_no_empty_parts() -> None:
    card = ModelCard(versions={}).render(CHAT)
    assert "# Language model, trained\n" in card
    for absent in ("Results", "How it was made", "Hyperparameters", "Training data", "None", "()"):
        assert absent not in card
    assert front_matter(card) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["alignment", "halos"],
    }


def test_the_command_and_the_commit_are_on_the_card() -> None:
    card = ModelCard(command="halos train 'loss.beta=`0.1`'", commit="ab12-dirty").render(CHAT)
    made = card.partition("## How it was made\n\n")[2].partition("\n\n## Versions")[0]
    assert made == "Command: ``halos train 'loss.beta=`0.1`'``\n\nCommit: `ab12-dirty`"
    assert "Commit" not in ModelCard(command="halos train").render(CHAT)


# The hub's front matter


@pytest.mark.parametrize("usage", [CHAT, Usage(chat=True, adapter=True), Usage(chat=False, end_of_turn="</s>")])
def test_the_hubs_own_reader_takes_the_front_matter(usage: Usage) -> None:
    names = ("Anthropic/hh-rlhf/helpful-base:train", "x.jsonl")
    text = ModelCard(loss="kto", base="Org/model-1.5B", data=names, metrics={"loss": 0.3}).render(usage)
    card = huggingface_hub.ModelCard(text)
    fields = card.data.to_dict()
    assert fields == front_matter(text)
    # Strictly: unknown metadata would be ignored with a warning.
    data = huggingface_hub.ModelCardData(ignore_metadata_errors=False, **fields)
    assert (data.base_model, data.datasets, data.library_name) == (
        "Org/model-1.5B",
        ["Anthropic/hh-rlhf"],
        fields["library_name"],
    )
    assert set(fields) <= set(inspect.signature(huggingface_hub.ModelCardData).parameters)
    assert fields["library_name"] in ("transformers", "peft")
    assert fields["pipeline_tag"] in ("text-generation", "text-classification")
    assert all(isinstance(tag, str) for tag in fields["tags"])


def test_only_ids_of_the_hub_are_named_as_base_and_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    names = ("Anthropic/hh-rlhf/helpful-base:train", "stanfordnlp/SHP", "data/train.jsonl", "/data/x.csv", "x.jsonl")
    card = ModelCard(loss="kto", base="Org/model-1.5B", data=names).render(CHAT)
    assert front_matter(card)["base_model"] == "Org/model-1.5B"
    assert front_matter(card)["datasets"] == ["Anthropic/hh-rlhf", "stanfordnlp/SHP"]
    for base in ("/models/mine", "./mine", "data", "pkg://halos.toy/reference"):
        card = ModelCard(loss="kto", base=base).render(CHAT)
        assert "base_model" not in front_matter(card)
        assert f"from `{base}`" in card


@pytest.mark.parametrize(
    ("usage", "library", "task"),
    [
        (CHAT, "transformers", "text-generation"),
        (Usage(chat=True, adapter=True), "peft", "text-generation"),
        (Usage(chat=True, end_of_turn="</s>"), "transformers", "text-classification"),
    ],
)
def test_library_and_task_are_those_of_the_model(usage: Usage, library: str, task: str) -> None:
    fields = front_matter(ModelCard(loss="l", base="b").render(usage))
    assert (fields["library_name"], fields["pipeline_tag"]) == (library, task)
    assert ("reward-model" in fields["tags"]) == (task == "text-classification")


# Strangers' configurations


@pytest.mark.parametrize("text", HOSTILE)
def test_no_value_breaks_front_matter_tables_or_code(text: str) -> None:
    values: dict[str, Any] = {"hyperparameters": {text: text, "b": 1}, "metrics": {text: 1.0}, "versions": {text: text}}
    card = ModelCard(loss=text, base=text, paper=(text, text), data=[text], **values)
    plain = ModelCard(
        loss="l", base="Org/b", paper=("t", "u"), data=["d"], hyperparameters={"a": "a", "b": 1}, metrics={"m": 1.0}
    )
    for usage in (Usage(chat=False, control=text), Usage(chat=True, end_of_turn=text)):
        rendered = card.render(usage)
        fields = front_matter(rendered)
        assert fields["tags"][2] == text
        assert set(fields) <= {"library_name", "pipeline_tag", "tags", "base_model"}
        assert {len(row) for row in tables(rendered)} == {2}
        assert repr(text) in code_of(rendered)
        compile(code_of(rendered), "card", "exec")
        body = rendered.split("\n---\n")[-1]
        headings = [line for line in body.splitlines() if line.startswith("#")]
        expected = [line for line in plain.render(usage).split("\n---\n")[-1].splitlines() if line.startswith("#")]
        assert len(headings) == len(expected)


def test_code_spans_are_longer_than_the_backticks_in_them() -> None:
    assert inline_code("a") == "`a`"
    assert inline_code("a`b``c") == "```a`b``c```"
    assert inline_code("`a\n b") == "`` `a b ``"
    assert inline_code("") == "`  `"
    assert table_cell("a|b") == r"`a\|b`"
    assert table_cell("a\\|b") == r"`a\ \|b`"


# The code


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("kind", ["policy", "control", "adapter", "reward model"])
def test_the_code_on_the_card_runs(kind: str, chat: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if kind == "adapter":
        pytest.importorskip("peft")
    tokenizer = tiny.word_tokenizer(tiny.CHATML if chat else None)
    end: Any = tokenizer.convert_tokens_to_ids(tiny.END)
    policy, folder = tiny.model(vocab_size=len(tokenizer)), tmp_path / "model"
    base = tmp_path / "base"
    policy.save_pretrained(base)
    card = ModelCard(loss="kto", base=str(base))
    if kind == "adapter":
        LoRA(enabled=True).attach(policy, base=str(base))
    if kind == "reward model":
        export_reward_model(policy, RewardHead(16).linear.weight, tokenizer, folder, end_of_turn=end, card=card)
    else:
        control = tiny.GOOD if kind == "control" else ""
        export_policy(policy, tokenizer, folder, end_of_turn=end, control=control, card=card)
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert ("peft" in code_of(text)) == (kind == "adapter")
    assert ("apply_chat_template" in code_of(text)) == chat
    namespace: dict[str, Any] = {}
    with torch.no_grad():
        exec(code_of(text).replace('folder = "."', f"folder = {str(folder)!r}").replace("=64", "=2"), namespace)
    printed = capsys.readouterr().out
    if kind == "reward model":
        assert float(printed) == 0  # the head starts at zero
        assert namespace["inputs"]["input_ids"][0, -1] == end
    else:
        assert printed.strip()
        good = tokenizer.convert_tokens_to_ids(tiny.GOOD)
        assert (namespace["inputs"]["input_ids"][0, -1] == good) == (kind == "control")
        assert (tiny.GOOD in text) == (kind == "control")


def test_text_that_is_not_unicode_does_not_end_a_run_at_its_export(tmp_path: Path) -> None:
    tokenizer = tiny.word_tokenizer(tiny.CHATML)
    card = ModelCard(loss="kto", base="caf\udce9")  # a path as Python reads it from a Latin-1 file system
    end: Any = tokenizer.convert_tokens_to_ids(tiny.END)
    export_policy(tiny.model(vocab_size=len(tokenizer)), tokenizer, tmp_path / "model", end_of_turn=end, card=card)
    assert r"caf\udce9" in (tmp_path / "model" / "README.md").read_text(encoding="utf-8")


def test_a_backbone_that_is_saved_from_python_names_its_loss(tmp_path: Path) -> None:
    backbone = Backbone.from_pretrained(tiny.save(tmp_path / "start"))
    backbone.loss, backbone.paper = "KTO", objectives.KTO.paper
    backbone.save_pretrained(tmp_path / "aligned")
    card = (tmp_path / "aligned" / "README.md").read_text(encoding="utf-8")
    assert f"# Language model from `{tmp_path}/start`, trained with the loss `KTO`\n" in card
    assert "https://arxiv.org/abs/2402.01306" in card
