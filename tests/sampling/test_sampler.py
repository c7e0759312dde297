"""Sampling into a file: resumable without doubles, conditioned by itself, readable as records."""

from pathlib import Path
from typing import Any

import pytest

from halos.data.records.record import Conversation, Message
from halos.data.rows.chat_tokens import ChatTokens, Limits
from halos.data.sources.feedback_files import FeedbackFiles
from halos.policy.loading import ModelSpec
from halos.policy.lookup import find_policy
from halos.sampling.engines import Decoding, TransformersEngine, VLLMEngine
from halos.sampling.prompts import SourcePrompt, distinct_prompts
from halos.sampling.sampler import Sampler
from halos.toy.model import GOOD
from halos.toy.source import ToySource

SPEC = ModelSpec(path="pkg://halos.toy/reference")
TOKENS = ChatTokens(SPEC.tokenizer(), Limits(64))
MODEL = SPEC.load().eval()
ASKED = distinct_prompts(ToySource(size=10).train().records, 10, 0)


def sampler(engine: Any = None, **options: Any) -> Sampler:
    decoding = Decoding(max_new_tokens=options.pop("max_new_tokens", 20), temperature=options.pop("temperature", 1.0))
    made = engine or (lambda: TransformersEngine(MODEL, TOKENS, decoding))
    return Sampler(made, TOKENS, **{"control": "", "count": 2, "batch_size": 6, "seed": 0, **options})


def test_a_killed_file_is_gone_on_with_and_ends_up_byte_for_byte_the_same(tmp_path: Path) -> None:
    whole = tmp_path / "whole.jsonl"
    assert sampler().write(ASKED, whole) == (20, 0)
    lines = whole.read_bytes().splitlines(keepends=True)
    assert len(lines) == 10
    for kept, torn in ((0, 5), (4, 30), (6, 0), (10, 0)):
        part = tmp_path / f"{kept}.jsonl"
        part.write_bytes(b"".join(lines[:kept]) + lines[kept % 10][:torn])
        total, _ = sampler().write(ASKED, part)
        assert part.read_bytes() == whole.read_bytes()
        assert total == 20 - 2 * kept


def test_a_complete_file_needs_no_model(tmp_path: Path) -> None:
    sampler().write(ASKED, tmp_path / "a.jsonl")
    assert sampler(lambda: pytest.fail("loaded")).write(ASKED, tmp_path / "a.jsonl") == (0, 0)


def test_the_file_reads_as_records_with_the_prompts_asked(tmp_path: Path) -> None:
    sampler().write(ASKED, tmp_path / "a.jsonl")
    records = FeedbackFiles(tmp_path / "a.jsonl").train().records
    assert [(record.id, record.prompt) for record in records] == [(one.id, one.prompt) for one in ASKED]
    assert all(len(record.completions) == 2 for record in records)
    assert all("<|" not in c.text and c.text for record in records for c in record.completions)


def test_the_file_keeps_tools_and_calls(tmp_path: Path) -> None:
    call = Message("assistant", "", '{"tool_calls": [{"name": "f"}]}')
    turns = (Message("user", "q"), call, Message("tool", "found"))
    prompts = [SourcePrompt("a", Conversation(turns, '[{"name": "f"}]', '{"tone": "kind"}')), SourcePrompt("b", turns)]
    tokenizer = SPEC.tokenizer()
    tokenizer.chat_template = (
        "{{ tools }}{% for m in messages %}{{ m.content }}{{ m.tool_calls }}{% endfor %}{{ tone }}"
    )
    tokens = ChatTokens(tokenizer, Limits(256))
    engine = TransformersEngine(MODEL, tokens, Decoding(max_new_tokens=4))
    Sampler(lambda: engine, tokens, control="", count=1, batch_size=6, seed=0).write(prompts, tmp_path / "a.jsonl")
    records = FeedbackFiles(tmp_path / "a.jsonl").train().records
    assert [(record.id, record.prompt) for record in records] == [(one.id, one.prompt) for one in prompts]


def test_samples_of_a_prompt_differ_unless_the_temperature_is_zero() -> None:
    warm = sampler(count=8).draw_all(ASKED[:3])
    assert all(len(set(one.texts)) > 1 for one in warm)
    cold = sampler(temperature=0.0).draw_all(ASKED[:3])
    assert all(one.texts[0] == one.texts[1] for one in cold)
    assert [one.texts for one in cold] == [one.texts for one in sampler(temperature=0.0, seed=9).draw_all(ASKED[:3])]


def test_the_seed_decides() -> None:
    first, again, other = (sampler(seed=seed, count=4).draw_all(ASKED) for seed in (0, 0, 1))
    assert first == again
    assert first != other


def test_cut_completions_are_counted_and_keep_their_last_word(tmp_path: Path) -> None:
    assert sampler(max_new_tokens=2).write(ASKED, tmp_path / "a.jsonl") == (20, 20)
    assert all(len(ids) == 2 for one in sampler(max_new_tokens=2).draw_all(ASKED) for ids in one.completions)
    assert TOKENS.text([8, 9, TOKENS.end_of_turn]) == TOKENS.text([8, 9]) == TOKENS.tokenizer.decode([8, 9])


def test_samples_for_other_prompts_are_refused(tmp_path: Path) -> None:
    sampler().write(ASKED, tmp_path / "a.jsonl")
    with pytest.raises(ValueError, match=r"output: .* holds samples for other prompts"):
        sampler().write(ASKED[:5], tmp_path / "a.jsonl")


def test_a_prompt_that_does_not_fit_is_named_before_a_model_is_loaded(tmp_path: Path) -> None:
    long = [SourcePrompt("r7", "refund " * 80)]
    with pytest.raises(ValueError, match="r7: expected a prompt shorter than"):
        sampler(lambda: pytest.fail("loaded")).write(long, tmp_path / "a.jsonl")


def test_the_control_token_ends_the_prompt() -> None:
    plain, conditioned = sampler(), sampler(control=GOOD)
    good = TOKENS.tokenizer.convert_tokens_to_ids(GOOD)
    assert conditioned.prompt_ids(ASKED) == [[*ids, good] for ids in plain.prompt_ids(ASKED)]


def test_vllm_is_asked_for_where_it_is_missing() -> None:
    with pytest.raises(ValueError, match=r"pip install 'halos\[vllm\]'"):
        VLLMEngine("m", TOKENS, Decoding(), dtype="float32")


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("max_new_tokens", [0, True, 1.5]),
        ("temperature", [-1.0, True, float("nan")]),
        ("top_p", [0.0, 1.5, True, None]),
    ],
)
def test_bad_decoding_is_named(name: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(ValueError, match=rf"^{name}: expected .*, found"):
            Decoding(**{name: value})


@pytest.mark.parametrize(("name", "key"), [("count", "samples"), ("batch_size", "batch_size"), ("seed", "seed")])
@pytest.mark.parametrize("value", [True, 1.5, -1, None])
def test_what_is_no_whole_number_is_refused(name: str, key: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{key}: expected a whole number from"):
        sampler(**{name: value})


def test_an_unfinished_run_is_no_policy(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("loss: {name: kto}\ndata: {}\nmodel: {path: x}\n")
    with pytest.raises(ValueError, match=r"policy: the run in .* has not finished"):
        find_policy("policy", str(tmp_path))
    with pytest.raises(ValueError, match="policy: no such directory"):
        find_policy("policy", "./nowhere")
