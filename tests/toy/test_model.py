"""The shipped tokenizer and reference policy."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from halos.data.records.truth import TrueReward
from halos.data.rows.chat_tokens import ChatTokens, Limits
from halos.data.rows.rendering import render
from halos.sampling.before_after import judged
from halos.sampling.generate import sample
from halos.toy.feedback import behaviour_completion
from halos.toy.model import (
    END,
    MAX_NEW_TOKENS,
    MAX_POSITIONS,
    REFERENCE_DIR,
    SPECIAL_TOKENS,
    TOPICS_REFERENCE_DIR,
    build_model,
    build_tokenizer,
    demonstrations,
    pretrain,
)
from halos.toy.source import ToyJudge
from halos.toy.topics_source import TopicsJudge
from halos.toy.world import prompts_of, words


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(REFERENCE_DIR)


@pytest.fixture(scope="module")
def reference() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(REFERENCE_DIR)


def test_the_shipped_tokenizer_is_the_built_one(tokenizer: PreTrainedTokenizerBase) -> None:
    built = build_tokenizer()
    assert tokenizer.backend_tokenizer.decoder.__getstate__() == built.backend_tokenizer.decoder.__getstate__()
    assert tokenizer.get_vocab() == built.get_vocab()
    assert tokenizer.chat_template == built.chat_template
    assert len({tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id}) == 3
    assert tokenizer.eos_token == END


def test_every_token_survives_a_round_trip(tokenizer: PreTrainedTokenizerBase) -> None:
    assert len(tokenizer) == len(SPECIAL_TOKENS) + len(words())
    for token in (*SPECIAL_TOKENS, *words()):
        ids = tokenizer(token)["input_ids"]
        assert len(ids) == 1
        assert tokenizer.decode(ids) == token


def test_texts_survive_a_round_trip_without_unk(tokenizer: PreTrainedTokenizerBase) -> None:
    rng = random.Random(0)
    for prompt in prompts_of("train")[::7] + prompts_of("val")[::7]:
        for text in (prompt, behaviour_completion(prompt, rng)):
            ids = tokenizer(text)["input_ids"]
            assert tokenizer.unk_token_id not in ids
            assert tokenizer.decode(ids) == text
    assert tokenizer.unk_token_id in tokenizer("a zebra")["input_ids"]


def test_chat_template_is_prefix_consistent(tokenizer: PreTrainedTokenizerBase) -> None:
    prompt, completion = (
        "i bought a lamp on monday. it is broken.",
        "thanks a lot. we will check the fault. best wishes.",
    )
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
    head, whole = render(tokenizer, prompt), tokenizer.apply_chat_template(turns, tokenize=False)
    assert head == f"<|user|>{prompt}<|assistant|>"
    assert whole == head + completion + END
    assert tokenizer(whole)["input_ids"] == tokenizer(head)["input_ids"] + tokenizer(completion + END)["input_ids"]


def test_demonstrations_score_the_completion_and_its_end(tokenizer: PreTrainedTokenizerBase) -> None:
    rows = demonstrations(tokenizer, ["it is broken.", "it is broken."], ["thanks a lot.", "hm."])
    scored = [tokenizer.decode(labels[labels != -100]) for labels in rows["labels"]]
    assert scored == ["thanks a lot. <|end|>", "hm. <|end|>"]
    assert rows["attention_mask"].sum(1).tolist() == [11, 9]


def test_the_shipped_reference_is_small_and_plain(reference: PreTrainedModel) -> None:
    assert (REFERENCE_DIR / "model.safetensors").stat().st_size < 1_000_000
    assert 5e4 < reference.num_parameters() < 2e5
    assert all(weight.dtype == torch.float32 for weight in reference.parameters())
    settings, config = reference.generation_config, reference.config
    assert (settings.do_sample, settings.temperature, settings.top_k, settings.top_p) == (True, 1.0, 0, 1.0)
    assert (settings.eos_token_id, settings.pad_token_id) == (config.eos_token_id, config.pad_token_id)


@pytest.mark.parametrize(
    ("folder", "judge", "share"),
    [(REFERENCE_DIR, ToyJudge(), 0.28), (TOPICS_REFERENCE_DIR, TopicsJudge(), 0.5)],
    ids=["toy", "topics"],
)
def test_each_reference_replies_as_well_as_its_worlds_writer(folder: Path, judge: TrueReward, share: float) -> None:
    reference, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    tokens, prompts = ChatTokens(tokenizer, Limits(MAX_POSITIONS)), judge.prompts(512)
    said = sample(
        reference,
        [tokens.prompt(prompt) for prompt in prompts],
        end_of_turn=tokens.end_of_turn,
        pad=tokenizer.pad_token_id,
        max_new_tokens=MAX_NEW_TOKENS,
    )
    assert judged(prompts, said, tokens, judge).desirable_share == pytest.approx(share, abs=0.07)


@pytest.mark.parametrize("topics", [False, True], ids=["toy", "topics"])
def test_a_fresh_model_is_seeded_and_learns(topics: bool) -> None:
    tokenizer = build_tokenizer()
    model, twin, other = (build_model(tokenizer, seed) for seed in (0, 0, 1))
    assert torch.equal(model.lm_head.weight, twin.lm_head.weight)
    assert not torch.equal(model.lm_head.weight, other.lm_head.weight)
    losses: list[float] = []
    pretrain(model, tokenizer, steps=30, batch_size=16, topics=topics, report=lambda _, loss: losses.append(loss))
    assert losses[-1] < losses[0] / 2
