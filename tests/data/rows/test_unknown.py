"""A tokenizer of few words on other people's texts is refused; one without a template is warned about."""

import logging
from pathlib import Path

import pytest

from halos.data.preparation.needs import DataNeeds
from halos.data.preparation.prepare import Preparation
from halos.data.rows.chat_tokens import ChatTokens, Limits
from halos.data.rows.exchanges import Exchange
from halos.data.rows.tokenise import make_rows
from halos.data.rows.unknown import unknown_id
from halos.data.sources.feedback_files import FeedbackFiles
from halos.data.streaming.preparation import StreamPreparation
from halos.data.views.examples import Demonstration
from halos.toy.model import UNK, build_tokenizer
from halos.toy.world import words
from tests import tiny

LIMITS = Limits(200)
KNOWN = " ".join(sorted(words())[:18])
"""18 tokens; the template adds two, and the completion ends with one more."""


@pytest.mark.parametrize(("strange", "share"), [(1, None), (2, None), (3, "12%")])
def test_more_than_a_tenth_of_unknown_tokens_is_refused(strange: int, share: str | None) -> None:
    tokens = ChatTokens(build_tokenizer(), LIMITS)
    example = Demonstration("f.csv:2", KNOWN, " ".join(["Kraków"] * strange))
    if share is None:
        assert len(make_rows([example], tokens)) == 1
        return
    with pytest.raises(
        ValueError, match=rf"^f\.csv:2: expected a tokenizer .*found {share} unknown tokens .*model\.path="
    ):
        make_rows([example], tokens)


@pytest.mark.parametrize("kind", [Preparation, StreamPreparation])
def test_the_toy_model_is_refused_on_other_texts_before_training(kind: type[Preparation], tmp_path: Path) -> None:
    file = tmp_path / "f.csv"
    file.write_text("question,answer,thumb\nWhat is the capital of France?,Paris.,up\nAnd of Italy?,Rome.,down\n")
    preparation = kind(source=FeedbackFiles(file), limits=LIMITS)
    with pytest.raises(ValueError, match=r"f\.csv:2.*: expected a tokenizer that knows the words of the data"):
        preparation.prepare(DataNeeds(view="binary"), build_tokenizer())


def test_what_counts_as_unknown() -> None:
    tokenizer = build_tokenizer()
    assert tokenizer.convert_ids_to_tokens(unknown_id(tokenizer)) == UNK
    tokenizer.eos_token = UNK  # as GPT-2's, which also ends texts with it
    assert unknown_id(tokenizer) is None
    assert unknown_id(tiny.bpe_tokenizer()) is None


@pytest.mark.parametrize(
    ("prompt", "reply", "text", "warns"),
    [
        ("q", "a", "plain", True),
        ("q\n", "a", "plain", False),
        ("q", " a", "plain", False),
        ("q", "a", "rendered", False),
    ],
)
def test_texts_that_meet_without_a_template(
    prompt: str, reply: str, text: str, warns: bool, caplog: pytest.LogCaptureFixture
) -> None:
    tokens = ChatTokens(tiny.bpe_tokenizer(), LIMITS, text)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            tokens.tokenise([Exchange("f:1", prompt, (reply,))])
    assert len(caplog.records) == warns
    if warns:
        assert caplog.records[0].getMessage().startswith("the tokenizer has no chat template: prompts and completions")
