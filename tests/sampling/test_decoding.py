"""Our decoding against ``generate`` of transformers, and what it saves."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, TopPLogitsWarper

from halos.sampling import decoding
from halos.sampling.choice import uniform_draws
from halos.sampling.decoding import decodes
from halos.sampling.generate import sample
from tests import architectures, tiny

END, PAD, NEW = 1, 0, 9


def prompts(samples: int = 3) -> list[list[int]]:
    """Prompts of uneven lengths, one of them with an end-of-turn token inside and two that begin alike, several times
    each."""
    rng = random.Random(0)
    distinct = [rng.choices(range(tiny.VOCABULARY), k=length) for length in (3, 11, 1, 6, 6, 9)]
    distinct[1][4] = END
    return [ids for ids in (*distinct, distinct[1][:5]) for _ in range(samples)]


class Inverse:
    """The first token whose cumulative probability is above the draw, by a loop over a sorted list of floats."""

    def __init__(self, draws: Tensor, width: int) -> None:
        self.draws, self.width = draws.tolist(), width

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        left = torch.full_like(scores, -torch.inf)
        for row, probabilities in enumerate(scores.double().softmax(-1).tolist()):
            draw, token, total = self.draws[row][ids.shape[1] - self.width], 0, probabilities[0]
            while total <= draw:
                token += 1
                total += probabilities[token]
            left[row, token] = 0.0
        return left


class Divided:
    def __init__(self, temperature: float) -> None:
        self.temperature = temperature

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        return scores / self.temperature


def generated(
    model: Any, asked: list[list[int]], processors: list[Any], draws: Tensor | None = None
) -> list[list[int]]:
    """What ``generate`` says to each prompt alone, without padding."""
    model.config.output_router_logits = False  # it would compute a mixture's loss, and fail
    said = []
    config = GenerationConfig(max_new_tokens=NEW, eos_token_id=END, pad_token_id=PAD, do_sample=False)
    for n, ids in enumerate(asked):
        own = [] if draws is None else [Inverse(draws[n : n + 1], len(ids))]
        inputs = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
        processed = LogitsProcessorList([*processors, *own])
        with torch.no_grad():
            output = model.generate(**inputs, generation_config=config, logits_processor=processed)
        said.append(output[0, len(ids) :].tolist())
    return said


def ours(model: Any, asked: list[list[int]], **options: Any) -> list[list[int]]:
    return sample(model, asked, end_of_turn=END, pad=PAD, max_new_tokens=NEW, **options)


def made(architecture: str) -> Any:
    model = (tiny if architecture in tiny.ARCHITECTURES else architectures).model(architecture).eval()
    # End-of-turn tokens come often and at different places.
    bias = torch.zeros(model.config.vocab_size)
    bias[END] = 3
    model.get_output_embeddings().register_forward_hook(lambda _, __, output: output + bias)
    return model


@pytest.mark.parametrize("architecture", [*tiny.ARCHITECTURES, "mixtral", "gpt_oss", "deepseek_v3"])
def test_completions_are_those_of_generate(architecture: str) -> None:
    model, asked = made(architecture), prompts()
    assert decodes(model)
    draws = uniform_draws(len(asked), NEW, seed=4)
    drawn = generated(model, asked, [], draws)
    lengths = {len(ids) for ids in drawn}
    assert min(lengths) < 4
    assert max(lengths) > 6
    model.config.output_router_logits = True
    assert ours(model, asked, draws=draws) == drawn
    assert model.config.output_router_logits
    assert ours(model, asked, temperature=0) == generated(model, asked, [])


@pytest.mark.parametrize("architecture", ["phi3", "lfm2", "mamba", "phimoe"])
def test_architectures_of_another_kind_are_left_to_generate(architecture: str) -> None:
    model, asked = made(architecture), prompts()
    assert not decodes(model)
    draws = uniform_draws(len(asked), NEW, seed=4)
    assert ours(model, asked, draws=draws) == generated(model, asked, [], draws)


def test_temperature_and_top_p_are_those_of_generate() -> None:
    model, asked = made("llama"), prompts()
    draws = uniform_draws(len(asked), NEW, seed=4)
    expected = generated(model, asked, [Divided(0.7), TopPLogitsWarper(0.8)], draws)
    assert ours(model, asked, draws=draws, temperature=0.7, top_p=0.8) == expected
    assert ours(model, asked, draws=draws) != expected


def test_a_seed_is_as_good_as_its_draws() -> None:
    model, asked = made("llama"), prompts()
    assert ours(model, asked, seed=3) == ours(model, asked, draws=uniform_draws(len(asked), NEW, seed=3))


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_neither_batches_nor_order_change_completions(architecture: str) -> None:
    model, asked = made(architecture), prompts()
    draws = uniform_draws(len(asked), NEW, seed=4)
    drawn = ours(model, asked, draws=draws)
    for batch_size in (1, 4, 20):
        assert ours(model, asked, draws=draws, batch_size=batch_size) == drawn
    backwards = ours(model, asked[::-1], draws=draws.flip(0))
    assert backwards[::-1] == drawn


def shapes(model: Any, asked: list[list[int]], **options: Any) -> list[tuple[int, ...]]:
    """The shapes of the ids that the model reads, forward by forward."""
    read: list[tuple[int, ...]] = []
    watch = model.register_forward_pre_hook(
        lambda _, args, kwargs: read.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    with watch:
        ours(model, asked, **options)
    return read


def test_equal_prompts_are_read_once_and_finished_completions_leave() -> None:
    model, asked = made("llama"), [[5, 6, 7]] * 40
    said = ours(model, asked, seed=2)
    (first, *steps) = shapes(model, asked, seed=2)
    assert first == (1, 3)
    assert {width for _, width in steps} == {1}
    # The forward that gives a token needs the completions that have not ended before.
    for place, (rows, _) in enumerate(steps, 1):
        running = sum(len(ids) > place for ids in said)
        assert running <= rows
        assert rows == 40 or running > decoding.LEAVE * rows - 1 or running == 0
    assert steps[-1][0] < 20


def test_prompts_of_different_lengths_are_read_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    model, asked = made("gemma2"), [[5] * 20, [6] * 4, [7] * 19, [8] * 5, [9] * 20, [9] * 3]
    draws = uniform_draws(6, NEW, seed=0)
    at_once = ours(model, asked, draws=draws)
    assert shapes(model, asked, draws=draws)[0] == (6, 20)
    monkeypatch.setattr(decoding, "PREFILL_TOKENS", 8)
    assert shapes(model, asked, draws=draws)[:4] == [(3, 20), (2, 5), (1, 3), (6, 1)]
    assert ours(model, asked, draws=draws) == at_once
    monkeypatch.setattr(decoding, "MOST_PREFILL_TOKENS", 40)
    assert shapes(model, asked, draws=draws)[:4] == [(2, 20), (1, 19), (2, 5), (1, 3)]
    assert ours(model, asked, draws=draws) == at_once
    # All ranks call a sharded model equally often, whatever their prompts are.
    assert shapes(model, asked, draws=draws, together=True)[:2] == [(6, 20), (6, 1)]


def test_long_completions_get_more_room() -> None:
    model = tiny.model("mistral", max_position_embeddings=256).eval()
    asked = [[5, 6], [7, 8, 9]]
    said = sample(model, asked, end_of_turn=-1, pad=PAD, max_new_tokens=150, temperature=0)
    config = GenerationConfig(max_new_tokens=150, eos_token_id=-1, pad_token_id=PAD, do_sample=False)
    for ids, completion in zip(asked, said, strict=True):
        inputs = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
        assert completion == model.generate(**inputs, generation_config=config)[0, len(ids) :].tolist()


def test_a_finished_rank_goes_on_while_others_need_its_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    model, asked = made("llama"), [[5, 6, 7], [8, 9]] * 3
    seed = next(seed for seed in range(99) if max(map(len, ours(model, asked, seed=seed))) < 6)
    alone = ours(model, asked, seed=seed)
    assert len(shapes(model, asked, seed=seed, together=True)) == max(map(len, alone))
    monkeypatch.setattr(decoding, "all_sum", lambda count: count + 1)  # another rank is never finished
    read = shapes(model, asked, seed=seed, together=True)
    assert len(read) == NEW
    assert min(rows for rows, _ in read[1:]) > 0
    assert ours(model, asked, seed=seed, together=True) == alone
