"""Reward models: exported as classifiers that plain transformers load, with the same scores."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.models.gemma2.modeling_gemma2 import Gemma2PreTrainedModel

from halos.data.batches.collate import collate
from halos.data.rows.token_rows import Row
from halos.policy.export.card import ModelCard
from halos.policy.export.reward_model import export_reward_model, padding_token, require_classifier
from halos.policy.heads import RewardHead
from halos.policy.logprobs.completions import completion_logprobs
from tests import tiny

CARD = ModelCard(loss="bradley_terry", base="some/model")


def head(width: int = 16) -> RewardHead:
    made = RewardHead(width)
    with torch.no_grad():
        made.linear.weight.normal_(generator=torch.Generator().manual_seed(0))
    return made


def export(policy: Any, tokenizer: Any, folder: Path, end: Any) -> Any:
    export_reward_model(policy, head().linear.weight, tokenizer, folder, end_of_turn=end, card=CARD)
    return AutoModelForSequenceClassification.from_pretrained(folder).eval()


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_plain_transformers_give_the_same_scores(architecture: str, tmp_path: Path) -> None:
    """As a padded batch too, although the tokenizer pads with the end of the turn."""
    if architecture == "gemma2" and Gemma2PreTrainedModel._supports_sdpa:
        pytest.skip("this transformers loads Gemma 2 with SDPA, without the caps of its attention's logits")
    tokenizer = tiny.word_tokenizer(tiny.CHATML, pad=tiny.END)
    end: Any = tokenizer.convert_tokens_to_ids(tiny.END)
    policy = tiny.model(architecture, vocab_size=len(tokenizer)).eval()
    rows = [
        Row(row.id, row.group, row.prompt, ((*row.branches[0], end),))
        for row in tiny.rows(4, vocabulary=len(tokenizer))
    ]
    with torch.no_grad():
        expected = head()(completion_logprobs(policy, collate(rows, last_hidden=True)).last[:, 0])
        loaded = export(policy, tokenizer, tmp_path / "model", end)
        pad = loaded.config.pad_token_id
        ids = [torch.tensor(row.prompt + row.branches[0]) for row in rows]
        found = loaded(input_ids=torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=pad)).logits
    torch.testing.assert_close(found[:, 0], expected, rtol=1e-4, atol=1e-5)
    assert loaded.config.num_labels == 1
    assert AutoTokenizer.from_pretrained(tmp_path / "model").pad_token_id == pad != end


def test_weights_keep_their_precision(tmp_path: Path) -> None:
    tokenizer = tiny.word_tokenizer(tiny.CHATML)
    policy = tiny.model(vocab_size=len(tokenizer), dtype=torch.bfloat16)
    loaded = export(policy, tokenizer, tmp_path / "model", tokenizer.convert_tokens_to_ids(tiny.END))
    assert loaded.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("options", "end", "expected"),
    [
        ({"pad": tiny.PAD}, tiny.END, tiny.PAD),
        ({"pad": tiny.EOS}, tiny.END, tiny.BOS),  # EOS may end a completion too
        ({"pad": tiny.END}, tiny.END, tiny.BOS),
        ({"pad": tiny.BOS}, tiny.BOS, "<|pad|>"),
    ],
)
def test_padding_never_ends_a_completion(options: dict[str, Any], end: str, expected: str) -> None:
    tokenizer = tiny.word_tokenizer(tiny.CHATML, **options)
    before = len(tokenizer)
    found = padding_token(tokenizer, tokenizer.convert_tokens_to_ids(end))  # type: ignore[arg-type]
    assert tokenizer.convert_ids_to_tokens(found) == expected
    assert (found >= before) == (expected == "<|pad|>")


def test_a_new_padding_token_gets_an_embedding(tmp_path: Path) -> None:
    tokenizer = tiny.word_tokenizer(tiny.CHATML, pad=tiny.BOS)
    policy = tiny.model(vocab_size=len(tokenizer)).eval()
    end: Any = tokenizer.convert_tokens_to_ids(tiny.BOS)
    loaded = export(policy, tokenizer, tmp_path / "model", end)
    assert loaded.get_input_embeddings().weight.shape[0] == len(tokenizer) + 1 == loaded.config.pad_token_id + 1


def test_the_head_starts_at_zero_and_passes_gradient_on() -> None:
    assert (RewardHead(3)(torch.randn(2, 5, 3)) == 0).all()
    hidden = torch.randn(4, 16, requires_grad=True)
    head()(hidden).sum().backward()
    assert hidden.grad.any()
    assert head().to(torch.bfloat16)(hidden).dtype == torch.float32
    assert head().double()(hidden).dtype == torch.float64


def test_an_architecture_without_a_classifier_is_refused() -> None:
    from transformers import AutoConfig

    require_classifier(tiny.config("llama"))
    config = AutoConfig.for_model(
        "granite", vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1
    )
    with pytest.raises(ValueError, match=r"model\.path: a reward model .* granite has none with a linear score"):
        require_classifier(config)
