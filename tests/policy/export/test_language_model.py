"""Exported models: whole, loadable by plain transformers, and conditioned once."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from halos.policy.export.card import ModelCard
from halos.policy.export.language_model import export_policy
from halos.policy.export.tokenizer import conditioned, unconditioned
from tests import tiny

TURNS = [{"role": "user", "content": "hello"}]
CARD = ModelCard(loss="kto", base="some/model")


@pytest.fixture
def tokenizer() -> Any:
    return tiny.word_tokenizer(tiny.CHATML)


@pytest.fixture
def policy(tokenizer: Any) -> Any:
    return tiny.model("llama", vocab_size=len(tokenizer))


def export(policy: Any, tokenizer: Any, folder: Path, **options: Any) -> Path:
    end: Any = tokenizer.convert_tokens_to_ids(tiny.END)
    export_policy(policy, tokenizer, folder, **{"end_of_turn": end, "card": CARD, **options})
    return folder


@pytest.mark.parametrize("tied", [False, True])
def test_plain_transformers_load_what_was_exported(tied: bool, tokenizer: Any, tmp_path: Path) -> None:
    policy = tiny.model("llama", vocab_size=len(tokenizer), tie_word_embeddings=tied).eval()
    loaded = AutoModelForCausalLM.from_pretrained(export(policy, tokenizer, tmp_path / "model")).eval()
    ids = torch.tensor([[8, 9, 10, 11]])
    assert torch.equal(loaded(input_ids=ids).logits, policy(input_ids=ids).logits)
    assert (tmp_path / "model" / "model.safetensors").is_file()
    again = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert again.chat_template == tokenizer.chat_template
    assert again("hello world")["input_ids"] == tokenizer("hello world")["input_ids"]


def test_weights_keep_their_precision(tokenizer: Any, tmp_path: Path) -> None:
    policy = tiny.model("llama", vocab_size=len(tokenizer), dtype=torch.bfloat16)
    loaded = AutoModelForCausalLM.from_pretrained(export(policy, tokenizer, tmp_path / "model"))
    assert loaded.dtype == torch.bfloat16
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in policy.state_dict().items())


@pytest.mark.parametrize(("own", "exported"), [(None, 5), (5, 5), (1, [1, 5]), ([1, 7], [1, 7, 5]), ([5, 1], [5, 1])])
def test_generation_also_stops_at_the_end_of_turn(
    own: Any, exported: Any, policy: Any, tokenizer: Any, tmp_path: Path
) -> None:
    assert tokenizer.convert_tokens_to_ids(tiny.END) == 5
    policy.generation_config.eos_token_id = own
    loaded = AutoModelForCausalLM.from_pretrained(export(policy, tokenizer, tmp_path / "model"))
    assert loaded.generation_config.eos_token_id == exported
    assert loaded.generation_config.pad_token_id == tokenizer.pad_token_id


def test_a_padding_token_of_the_base_is_kept(policy: Any, tokenizer: Any, tmp_path: Path) -> None:
    policy.generation_config.pad_token_id = 3
    loaded = AutoModelForCausalLM.from_pretrained(export(policy, tokenizer, tmp_path / "model"))
    assert loaded.generation_config.pad_token_id == 3


@pytest.mark.parametrize("control", ["", tiny.GOOD])
def test_the_generation_prompt_ends_with_the_control_token_once(control: str, tokenizer: Any) -> None:
    before = copy.deepcopy(tokenizer.chat_template)
    text = tokenizer.apply_chat_template(TURNS, add_generation_prompt=True, tokenize=False)
    once = conditioned(tokenizer, control)
    for made in (once, conditioned(once, control)):
        assert made.apply_chat_template(TURNS, add_generation_prompt=True, tokenize=False) == text + control
        assert made.apply_chat_template(TURNS, tokenize=False) == tokenizer.apply_chat_template(TURNS, tokenize=False)
    assert tokenizer.chat_template == before


def test_each_of_several_templates_is_conditioned() -> None:
    several: Any = {"default": tiny.CHATML, "tool_use": tiny.WITH_EOT}
    tokenizer = tiny.word_tokenizer(several)
    made = conditioned(tokenizer, tiny.GOOD)
    assert {name: text.count(tiny.GOOD) for name, text in made.chat_template.items()} == {"default": 1, "tool_use": 1}
    unconditioned(made, tiny.GOOD)
    assert made.chat_template == several


def test_a_tokenizer_without_a_template_has_nothing_to_condition() -> None:
    assert conditioned(tiny.word_tokenizer(None), tiny.GOOD).chat_template is None


def test_the_exported_template_is_conditioned(policy: Any, tokenizer: Any, tmp_path: Path) -> None:
    loaded = AutoTokenizer.from_pretrained(export(policy, tokenizer, tmp_path / "model", control=tiny.GOOD))
    ids = loaded.apply_chat_template(TURNS, add_generation_prompt=True, return_dict=False)
    assert ids[-1] == tokenizer.convert_tokens_to_ids(tiny.GOOD)
    assert ids.count(ids[-1]) == 1  # type: ignore[arg-type]


def test_an_earlier_export_is_replaced(policy: Any, tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "old.safetensors").write_text("old")
    (tmp_path / "model.part").mkdir()  # what a killed export leaves
    (tmp_path / "model.part" / "old").write_text("old")
    export(policy, tokenizer, tmp_path / "model")
    assert {file.name for file in tmp_path.iterdir()} == {"model"}
    assert {"old.safetensors", "old"}.isdisjoint(file.name for file in (tmp_path / "model").iterdir())


def test_an_export_that_fails_leaves_the_earlier_one(
    policy: Any, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export(policy, tokenizer, tmp_path / "model")
    before = {file.name: file.read_bytes() for file in (tmp_path / "model").iterdir()}

    def fail(*_: Any, **__: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "write_text", fail)
    with pytest.raises(OSError, match="no space"):
        export(tiny.model("llama", vocab_size=len(tokenizer), seed=1), tokenizer, tmp_path / "model")
    assert {file.name: file.read_bytes() for file in (tmp_path / "model").iterdir()} == before
