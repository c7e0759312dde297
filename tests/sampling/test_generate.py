"""Sampling in batches says what the model would say alone."""

from typing import Any

import pytest
import torch
from torch import Tensor

from halos.data.rows.chat_tokens import ChatTokens, Limits
from halos.policy.loading import ModelSpec
from halos.sampling.choice import token_at, uniform_draws
from halos.sampling.generate import sample
from tests import tiny

SPEC = ModelSpec(path="pkg://halos.toy/reference")
TEXTS = (
    "i bought a lamp on monday. it does not switch on.",
    "i paid twice.",
    "we ordered a tent last week. please help.",
)


@pytest.fixture(scope="module")
def model() -> Any:
    return SPEC.load()


@pytest.fixture(scope="module")
def tokens() -> ChatTokens:
    return ChatTokens(SPEC.tokenizer(), Limits(64))


@pytest.fixture(scope="module")
def prompts(tokens: ChatTokens) -> list[list[int]]:
    return [tokens.prompt(text) for text in TEXTS]


def say(model: Any, tokens: ChatTokens, prompts: list[list[int]], **options: Any) -> list[list[int]]:
    options = {"max_new_tokens": 20, "end_of_turn": tokens.end_of_turn, "pad": tokens.tokenizer.pad_token_id, **options}
    return sample(model, prompts, **options)


@torch.no_grad()
def greedy(model: Any, prompt: list[int], end: int, most: int) -> list[int]:
    """The likeliest tokens, one forward each."""
    ids = list(prompt)
    while len(ids) < len(prompt) + most and (len(ids) == len(prompt) or ids[-1] != end):
        ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


@torch.no_grad()
def logprob(model: Any, prompt: list[int], completion: list[int]) -> float:
    logits = model(input_ids=torch.tensor([prompt + completion])).logits[0].log_softmax(-1)
    return float(sum(logits[len(prompt) + t - 1, token] for t, token in enumerate(completion)))


def test_the_seed_decides_what_is_said(model: Any, tokens: ChatTokens, prompts: list[list[int]]) -> None:
    one = say(model, tokens, prompts * 4, seed=1)
    torch.rand(3)
    assert say(model, tokens, prompts * 4, seed=1) == one
    assert say(model, tokens, prompts * 4, seed=2) != one


@pytest.mark.parametrize("training", [True, False])
def test_sampling_leaves_no_trace(training: bool, model: Any, tokens: ChatTokens, prompts: list[list[int]]) -> None:
    model.train(training)
    before, config = torch.random.get_rng_state(), model.generation_config.to_dict()
    say(model, tokens, prompts, seed=5)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert model.training is training
    assert model.generation_config.to_dict() == config
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def test_a_failure_leaves_no_trace_either(model: Any, tokens: ChatTokens, prompts: list[list[int]]) -> None:
    model.train()
    config = model.generation_config
    with pytest.raises(IndexError):
        say(model, tokens, [[len(tokens.tokenizer)]])
    assert model.training
    assert model.generation_config is config


def test_dropout_is_off_while_sampling(tokens: ChatTokens, prompts: list[list[int]]) -> None:
    noisy = ModelSpec(path=SPEC.path, dropout=0.9).load()
    assert say(noisy, tokens, prompts, seed=3) == say(SPEC.load().eval(), tokens, prompts, seed=3)


@pytest.mark.parametrize("batch_size", [1, 2, 256])
def test_padding_and_batches_do_not_change_what_is_likeliest(
    batch_size: int, model: Any, tokens: ChatTokens, prompts: list[list[int]]
) -> None:
    cold = say(model, tokens, prompts, temperature=1e-4, batch_size=batch_size)
    assert len({len(prompt) for prompt in prompts}) == len(prompts)
    assert cold == [greedy(model, prompt, tokens.end_of_turn, 20) for prompt in prompts]


@pytest.mark.parametrize("architecture", ["gpt2", "gemma2"])
def test_padding_does_not_change_what_other_architectures_say(architecture: str) -> None:
    model = tiny.model(architecture).eval()
    prompts = [list(row.prompt) for row in tiny.rows(6)]
    cold = sample(model, prompts, end_of_turn=1, pad=0, max_new_tokens=6, temperature=1e-4)
    assert cold == [greedy(model, prompt, 1, 6) for prompt in prompts]


def frequencies(said: list[list[int]], size: int) -> Tensor:
    return torch.bincount(torch.tensor([ids[0] for ids in said]), minlength=size) / len(said)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_tokens_come_as_often_as_the_model_says(
    temperature: float, model: Any, tokens: ChatTokens, prompts: list[list[int]]
) -> None:
    model.eval()
    short = min(prompts, key=len)
    with torch.no_grad():
        exact = (model(input_ids=torch.tensor([short])).logits[0, -1] / temperature).softmax(-1)
    said = say(model, tokens, [short] * 3999 + [max(prompts, key=len)], max_new_tokens=1, temperature=temperature)
    distance = 0.5 * (frequencies(said[:-1], len(exact)) - exact).abs().sum()
    assert float(distance) < 0.05  # 4000 draws from the right distribution are about 0.02 away


@pytest.mark.parametrize(
    "own",
    [
        {"temperature": 0.01},
        {"top_p": 0.01},
        {"top_k": 1},
        {"repetition_penalty": 9.0},
        {"min_p": 0.9},
        {"num_beams": 2},
    ],
    ids=str,
)
def test_the_models_own_generation_settings_do_not_matter(
    own: dict[str, Any], model: Any, tokens: ChatTokens, prompts: list[list[int]]
) -> None:
    plain = say(model, tokens, prompts * 8)
    opinionated = SPEC.load()
    opinionated.generation_config.update(**own)
    assert say(opinionated, tokens, prompts * 8) == plain


def test_a_completion_ends_with_its_end_of_turn_or_at_the_limit(
    model: Any, tokens: ChatTokens, prompts: list[list[int]]
) -> None:
    said = say(model, tokens, prompts * 20, max_new_tokens=12)
    ended = [ids for ids in said if ids[-1] == tokens.end_of_turn]
    assert 0 < len(ended) < len(said)
    assert all(tokens.end_of_turn not in ids[:-1] for ids in said)
    assert {len(ids) for ids in said if ids[-1] != tokens.end_of_turn} == {12}
    assert max(map(len, ended)) <= 12


def test_an_end_of_turn_in_the_prompt_does_not_end_the_completion(
    model: Any, tokens: ChatTokens, prompts: list[list[int]]
) -> None:
    conversation = [prompts[1] + tokens.completion("happy to help.", "a") + prompts[1]]
    assert say(model, tokens, conversation, temperature=1e-4) == [
        greedy(model.eval(), conversation[0], tokens.end_of_turn, 20)
    ]


def test_with_draws_a_reply_does_not_depend_on_its_batch(
    model: Any, tokens: ChatTokens, prompts: list[list[int]]
) -> None:
    several, draws = prompts * 4, uniform_draws(12, 20, seed=3)
    drawn = say(model, tokens, several, draws=draws)
    for batch_size in (1, 5):
        assert say(model, tokens, several, draws=draws, batch_size=batch_size) == drawn
    for n in (0, 7):
        assert say(model, tokens, several[n : n + 1], draws=draws[n : n + 1]) == drawn[n : n + 1]
    assert len({tuple(ids) for ids in drawn[::3]}) > 1


@torch.no_grad()
def test_with_draws_the_first_token_follows_its_distribution(
    model: Any, tokens: ChatTokens, prompts: list[list[int]]
) -> None:
    count = 2000
    logits = model.eval()(input_ids=torch.tensor([prompts[0]])).logits[0, -1]
    drawn = say(model, tokens, prompts[:1] * count, draws=uniform_draws(count, 1, seed=0), max_new_tokens=1)
    counts = torch.bincount(torch.tensor(drawn)[:, 0], minlength=len(logits))
    p = logits.double().softmax(-1)
    deviations = (counts - count * p).abs() / (count * p * (1 - p)).sqrt().clamp(min=1)
    assert deviations.max() < 4.5


def test_each_token_has_its_share_of_the_draws() -> None:
    # 200 equally probable tokens among 300: the draw's place among them is the token's.
    possible = torch.arange(200) + 50
    logits = torch.full((1, 300), -torch.inf).index_fill(1, possible, 2.0).expand(400, -1)
    draws = (torch.arange(400, dtype=torch.float64) + 0.5) / 400
    assert token_at(logits, draws).tolist() == [50 + n // 2 for n in range(400)]


def test_impossible_tokens_are_never_drawn() -> None:
    scores = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]] * 4)
    draws = torch.tensor([0.0, 0.499, 0.5, 1 - 2**-53], dtype=torch.float64)
    assert token_at(scores, draws).tolist() == [1, 1, 3, 3]
