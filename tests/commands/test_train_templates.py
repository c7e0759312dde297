"""Templates end to end: what a run was trained on is what plain transformers generates from the exported model."""

import datetime
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import halos.commands.assembly
from tests.data.rows.traits import CALLS, FORGETS, THINKS, TRAITS, metaspace_bpe, unigram
from tests.tiny import bpe_tokenizer
from tests.train_runs import run, run_until

pytestmark = pytest.mark.runs

TOPICS = ("a", "bad", "good", "hello", "world", "user", "again", "bad a", "good b", "c d")


def save_model(folder: Path, tokenizer: Any) -> Path:
    size = len(tokenizer)
    shape: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    config = LlamaConfig(vocab_size=size, **shape, max_position_embeddings=256, bos_token_id=None, eos_token_id=1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def trained(folder: Path, tokenizer: Any, replies: list[str], *words: str) -> tuple[Any, Any]:
    """The exported model and tokenizer of 150 steps of SFT on a reply to each topic."""
    file = folder / "rows.jsonl"
    rows = [{"prompt": topic, "completion": reply} for topic, reply in zip(TOPICS, replies, strict=True)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return trained_on(folder, save_model(folder / "base", tokenizer), file, *words)


def trained_on(folder: Path, path: Path, file: Path, *words: str) -> tuple[Any, Any]:
    model = ("loss=sft", "model=hf", f"model.path={path}", "data=files", f"data.train={file}", "data.val_size=0")
    steps = ("trainer.max_epochs=null", "trainer.max_steps=150", "data.batch_size=10", "optim.lr=0.005")
    run(folder / "out", *model, *steps, "data.max_length=128", f"cache_dir={folder / 'cache'}", *words)
    made = folder / "out" / "model"
    return AutoModelForCausalLM.from_pretrained(made).eval(), AutoTokenizer.from_pretrained(made)


def replied(model: Any, tokenizer: Any, topic: str, **values: Any) -> str:
    """What a user of transformers gets: the exported template's prompt, greedily continued."""
    turns = [{"role": "user", "content": topic}]
    inputs = tokenizer.apply_chat_template(
        turns, add_generation_prompt=True, return_tensors="pt", return_dict=True, **values
    )
    ids = inputs["input_ids"]
    found = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=80, do_sample=False)
    whole, prompt = (
        tokenizer.decode(one, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        for one in (found[0], ids[0])
    )
    return str(whole.removeprefix(prompt))


def check(folder: Path, tokenizer: Any, *words: str, opening: str, closing: str, content: Any = str) -> None:
    replies = [f" {topic}: {n % 3}\n" if n % 2 else f"{topic}, {n}" for n, topic in enumerate(TOPICS)]
    model, made = trained(folder, tokenizer, replies, *words)
    for topic, reply in zip(TOPICS, replies, strict=True):
        assert replied(model, made, topic) == opening + content(reply) + closing


@pytest.mark.slow
@pytest.mark.parametrize("trait", [name for name, trait in TRAITS.items() if not trait.values])
def test_the_exported_model_writes_what_the_template_writes(trait: str, tmp_path: Path) -> None:
    one = TRAITS[trait]
    check(tmp_path, bpe_tokenizer(one.template), opening=one.opening, closing=one.closing, content=one.content)


@pytest.mark.slow
@pytest.mark.parametrize("trait", ["plain markers", "spaces", "think tag opened"])
@pytest.mark.parametrize("family", [metaspace_bpe, unigram])
def test_no_dummy_space_is_learned(family: Any, trait: str, tmp_path: Path) -> None:
    one = TRAITS[trait]
    check(tmp_path, family(one.template), opening=one.opening, closing=one.closing, content=one.content)


@pytest.mark.slow
def test_a_value_of_the_template_is_the_default_of_the_export(tmp_path: Path) -> None:
    tokenizer = bpe_tokenizer(FORGETS)
    (tmp_path / "refused").mkdir()
    with pytest.raises(ValueError, match=r"found 10 of 10 .* set model\.chat_template_kwargs\.enable_thinking=false"):
        check(tmp_path / "refused", tokenizer, opening="", closing="")
    check(tmp_path, tokenizer, "++model.chat_template_kwargs.enable_thinking=false", opening="", closing="<|im_end|>")
    made = AutoTokenizer.from_pretrained(tmp_path / "out" / "model")
    turns = [{"role": "user", "content": "a"}]
    thinking = made.apply_chat_template(turns, add_generation_prompt=True, tokenize=False, enable_thinking=True)
    assert thinking.endswith("assistant\n<think>\n"), "a caller can still choose"


@pytest.mark.slow
def test_one_of_several_templates_by_its_name(tmp_path: Path) -> None:
    several: Any = {"default": FORGETS, "tool_use": FORGETS, "brief": THINKS}
    one = TRAITS["think block inserted"]
    words = ("model.chat_template=brief",)
    check(tmp_path, bpe_tokenizer(several), *words, opening=one.opening, closing=one.closing)


@pytest.mark.slow
@pytest.mark.parametrize("calls", [False, True])
def test_rendered_texts_train_what_they_say(calls: bool, tmp_path: Path) -> None:
    template = CALLS.replace("<|eot|>", "<|im_end|>\n")
    tokenizer = bpe_tokenizer(template)

    def written(topic: str, *reply: dict[str, Any]) -> str:
        turns = [{"role": "user", "content": topic}, *reply]
        return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=not reply))

    rows = []
    for topic in TOPICS:
        function = {"name": "f", "arguments": {"x": topic}}
        call = {"role": "assistant", "content": "", "tool_calls": [{"function": function}]} if calls else {}
        reply = call or {"role": "assistant", "content": f"{topic}!"}
        prompt = written(topic)
        rows.append({"prompt": prompt, "completion": written(topic, reply).removeprefix(prompt)})
    path, file = save_model(tmp_path / "base", tokenizer), tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    model, made = trained_on(tmp_path, path, file, "data.text=rendered")
    for topic, row in zip(TOPICS, rows, strict=True):
        assert replied(model, made, topic) == row["completion"].rstrip()


@pytest.mark.slow
def test_csft_conditions_the_exported_prompt_on_its_token(tmp_path: Path) -> None:
    one = TRAITS["think block inserted"]
    tokenizer, file = bpe_tokenizer(one.template), tmp_path / "rows.jsonl"
    rows = [
        {"prompt": topic, "completion": f"{topic} {'yes' if label else 'no'}", "label": label}
        for topic in TOPICS[:5]
        for label in (True, False)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    model, made = trained_on(tmp_path, save_model(tmp_path / "base", tokenizer), file, "loss=csft")
    for topic in TOPICS[:5]:
        assert replied(model, made, topic) == one.completion(f"{topic} yes")


def test_a_dated_template_writes_one_date_in_a_run_also_where_it_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save_model(tmp_path / "base", bpe_tokenizer(TRAITS["dated"].template))
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"prompt": topic, "completion": "b"}) + "\n" for topic in TOPICS))
    words = ("loss=sft", "model=hf", f"model.path={path}", "data=files", f"data.train={file}", "data.batch_size=5")
    more = ("trainer.max_epochs=2", f"cache_dir={tmp_path / 'cache'}", "checkpoint.every=1", "data.val_size=0")
    monkeypatch.setattr(halos.commands.assembly, "today", lambda: datetime.date(2026, 3, 5))
    run_until("on_train_batch_end", 3, tmp_path / "out", *words, *more)
    monkeypatch.setattr(halos.commands.assembly, "today", lambda: datetime.date(2026, 3, 6))
    run(tmp_path / "out", *words, *more, "resume=auto")
    config = OmegaConf.load(tmp_path / "out" / "config.yaml")
    assert config.model.chat_template_date == "2026-03-05"
    made = AutoTokenizer.from_pretrained(tmp_path / "out" / "model")
    assert made.chat_template == TRAITS["dated"].template, "the day on which it is used"


def test_a_run_of_the_users_own_classes_resumes_with_its_date(tmp_path: Path) -> None:
    # The folder's configuration names a class that no command but the user's own may build; only its date is read.
    saved = {"loss": {"_target_": "mylab.losses.MyLoss"}, "data": {}, "model": {"chat_template_date": "2026-03-05"}}
    OmegaConf.save(OmegaConf.create(saved), tmp_path / "config.yaml")
    cfg = OmegaConf.create({"model": {"chat_template_date": None}})
    halos.commands.assembly._fix_date(cfg, tmp_path / "checkpoints" / "step_1.ckpt")
    assert cfg.model.chat_template_date == "2026-03-05"
