"""Tokens without embeddings: counted, started as the mean of the others, trained and exported, or refused."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from halos.data.batches.collate import collate
from halos.policy.backbone import Backbone
from halos.policy.loading import LoadOptions, ModelSpec
from halos.policy.logprobs.completions import completion_logprobs
from halos.policy.lora import LoRA
from halos.sharding.factory import BackboneFactory
from tests import tiny
from tests.policy.test_lora import shake

ROWS, NEW = 20, ["<|one|>", "<|two|>"]


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def base(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A model with 20 rows, whose tokenizer has 22 tokens."""
    folder = tiny.save(tmp_path / "base", tie_word_embeddings=request.param)
    tokenizer = tiny.word_tokenizer(tiny.CHATML)
    tokenizer.add_tokens(NEW)
    tokenizer.save_pretrained(folder)
    return folder


def batch() -> Any:
    return collate(tiny.rows(4, branches=2, vocabulary=22), packing=True, share_prompts=True)


def matrices(model: Any) -> list[torch.Tensor]:
    return [get().weight.detach().clone() for get in (model.get_input_embeddings, model.get_output_embeddings)]


def test_missing_rows_are_counted_and_start_as_the_mean(base: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        backbone = Backbone.from_pretrained(base, reference="live")
    assert f"the tokenizer has 22 tokens, and {base} embeddings for 20; the 2 rows" in caplog.text
    before = matrices(AutoModelForCausalLM.from_pretrained(base))
    for model in (backbone.policy, backbone.reference):
        for old, new in zip(before, matrices(model), strict=True):
            assert torch.equal(new[:ROWS], old)
            torch.testing.assert_close(new[ROWS:], old.mean(0).expand(2, -1), rtol=0, atol=1e-7)


def test_a_tokenizer_that_fits_is_not_mentioned(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        BackboneFactory(ModelSpec(path=str(tiny.save(tmp_path))))
    assert "embeddings" not in caplog.text


def test_a_reference_loaded_apart_starts_with_the_same_rows(base: Path) -> None:
    factory = BackboneFactory(ModelSpec(path=str(base), reference="cached"))
    policy = factory.make(reference=True, sharding=None)
    policy.updated = True
    reference = factory.reference_scorer(policy, None)
    for one, other in zip(matrices(policy.policy), matrices(reference.policy), strict=True):
        assert torch.equal(one, other)


def test_lora_trains_the_missing_rows_and_no_others(base: Path, tmp_path: Path) -> None:
    factory = BackboneFactory(ModelSpec(path=str(base), reference="cached", lora=LoRA(enabled=True, rank=2)))
    backbone = factory.make(reference=False, sharding=None)
    before = matrices(ModelSpec(path=str(base)).load(LoadOptions(vocabulary=22)))
    shake(backbone.policy)
    expected = completion_logprobs(backbone.policy, batch()).tokens.detach()
    backbone.save_pretrained(tmp_path / "out")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for old, new in zip(before, matrices(exported), strict=True):
        assert [n for n in range(22) if not torch.equal(old[n], new[n])] == [20, 21]
    torch.testing.assert_close(completion_logprobs(exported, batch()).tokens, expected, rtol=0, atol=1e-4)
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out")) == 22


def test_gradients_reach_the_missing_rows_of_the_head() -> None:
    model = tiny.model("llama")
    LoRA(enabled=True, rank=2).attach(model, base="x", new_tokens=[3, 5])
    completion_logprobs(model, batch()).tokens.sum().backward()
    trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad and "trainable_tokens" in name}
    assert sorted(name.partition(".token_adapter")[0] for name in trained) == ["lm_head", "model.embed_tokens"]
    assert all(grad is not None and grad.abs().sum() > 0 for grad in trained.values())


def test_a_head_with_a_bias_is_refused_where_peft_would_drop_the_bias() -> None:
    model = tiny.model("llama")
    model.lm_head = nn.Linear(16, tiny.VOCABULARY, bias=True)
    with pytest.raises(ValueError, match=r"^model\.lora\.enabled: the base has no trained rows for 2 tokens.*bias"):
        LoRA(enabled=True).attach(model, base="x", new_tokens=[3, 5])


@pytest.mark.parametrize("options", [{"export": "adapter"}, {"path": "adapter"}])
def test_an_adapter_that_would_not_fit_its_base_is_refused_before_weights_are_read(
    options: dict[str, Any], base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LoRA, "check", lambda _: None)
    spec = ModelSpec(path=str(base), reference="cached", lora=LoRA(enabled=True, **options))
    with pytest.raises(ValueError, match=r"^model\.lora\.export: expected merged and no .*, as 2 tokens"):
        BackboneFactory(spec)


def test_control_tokens_are_refused_in_the_same_way(tmp_path: Path) -> None:
    spec = ModelSpec(path=str(tiny.save(tmp_path)), reference="cached", lora=LoRA(enabled=True, export="adapter"))
    factory = BackboneFactory(spec)
    with pytest.raises(ValueError, match=r"^model\.lora\.export: .*as 1 tokens are new"):
        factory.add_control_tokens(["<|new|>"])


def test_an_adapter_of_the_resized_base_fits_it(base: Path, tmp_path: Path) -> None:
    """What the error says to do."""
    peft = pytest.importorskip("peft")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    model.resize_token_embeddings(len(tokenizer))
    for made in (model, tokenizer):
        made.save_pretrained(tmp_path / "resized")
    lora = LoRA(enabled=True, rank=2, export="adapter")
    backbone = Backbone.from_pretrained(tmp_path / "resized", reference="adapter", lora=lora)
    shake(backbone.policy)
    backbone.save_pretrained(tmp_path / "out")
    loaded = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tmp_path / "resized"), tmp_path / "out"
    )
    expected = completion_logprobs(backbone.policy, batch()).tokens
    actual = completion_logprobs(loaded.base_model.model, batch()).tokens
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
