"""The kernel of packed attention is the first one that is exact on the device; stand-ins play what devices do."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from halos.data.batches.packing import Pack, map_tensors, pack
from halos.policy.logprobs import attention, attention_choice, flex, varlen
from halos.policy.logprobs.attention import PackedAttention
from halos.policy.logprobs.attention_choice import (
    CANDIDATES,
    Heads,
    chosen_attention,
    dense_attention,
    first_exact,
    obstacle,
)
from halos.policy.logprobs.flex import ScoreOptions, block_mask, flex_attend
from tests.policy.logprobs.test_flex import ROWS, visible
from tests.policy.logprobs.test_varlen import one_by_one

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")

PLAIN = ScoreOptions()
OPTIONS = [PLAIN, ScoreOptions(scaling=0.3), ScoreOptions(window=4096), ScoreOptions(softcap=2.0)]
BY_FLEX, BY_VARLEN = CANDIDATES["flex"], CANDIDATES["varlen"]


def heads(options: ScoreOptions = PLAIN, dtype: torch.dtype = torch.float32) -> Heads:
    return Heads(torch.device("cpu"), dtype, 4, 2, 16, options)


def exact(item: Pack, query: Tensor, key: Tensor, value: Tensor, options: ScoreOptions) -> Tensor:
    return dense_attention(item, query, key, value, options).to(query.dtype)


def raises(*_: object) -> Tensor:
    raise RuntimeError("Failed to find C compiler.\nPlease install one.")


def sees_other_branches(item: Pack, query: Tensor, key: Tensor, value: Tensor, options: ScoreOptions) -> Tensor:
    flat = map_tensors(item, lambda tensor: tensor)
    if not item.continues:
        flat.node = torch.zeros_like(item.node)
    return exact(flat, query, key, value, options)


def forgets_what_it_continues(item: Pack, query: Tensor, key: Tensor, value: Tensor, options: ScoreOptions) -> Tensor:
    earlier = len(item.node) - len(item.input_ids)
    if earlier:
        value = torch.cat([torch.zeros_like(value[:, :, :earlier]), value[:, :, earlier:]], 2)
    return exact(item, query, key, value, options)


def not_a_number(item: Pack, query: Tensor, key: Tensor, value: Tensor, options: ScoreOptions) -> Tensor:
    return exact(item, query, key, value, options) * float("nan")


def wrong_backward(item: Pack, query: Tensor, key: Tensor, value: Tensor, options: ScoreOptions) -> Tensor:
    return exact(item, query, key.detach() + 0 * key, value, options)


def test_the_first_exact_kernel_is_chosen() -> None:
    assert first_exact({"one": exact, "other": raises}, heads()) == ("one", {})
    name, refused = first_exact({"one": raises, "two": not_a_number, "three": exact, "four": exact}, heads())
    assert name == "three"
    assert refused["one"] == "RuntimeError: Failed to find C compiler."
    assert refused["two"].startswith("it differs from attention with all scores: output by nan, gradient of queries")
    name, refused = first_exact({"one": raises}, heads())
    assert (name, list(refused)) == ("pieces", ["one"])


@pytest.mark.parametrize(
    ("attend", "what"),
    [
        (sees_other_branches, "output by"),
        (forgets_what_it_continues, "continued output by"),
        (wrong_backward, "gradient of keys by 1$"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_wrong_kernel_is_refused(attend: attention_choice.Attend, what: str, dtype: torch.dtype) -> None:
    assert obstacle(exact, heads(dtype=dtype)) is None
    reason = obstacle(attend, heads(dtype=dtype))
    assert reason is not None
    assert reason.startswith(f"it differs from attention with all scores: {what.removesuffix('$')}")


def test_a_kernel_that_fails_at_another_size_is_refused() -> None:
    sizes = set()

    def of_one_size(item: Pack, query: Tensor, key: Tensor, value: Tensor, options: ScoreOptions) -> Tensor:
        sizes.update([] if item.continues else [len(item.input_ids)])
        if len(sizes) > 1:  # torch.compile makes code for all sizes when it meets the second one
            raise RuntimeError("no code for dynamic shapes")
        return exact(item, query, key, value, options)

    assert obstacle(of_one_size, heads()) == "RuntimeError: no code for dynamic shapes"


def test_a_window_that_is_one_token_too_wide_is_refused() -> None:
    def wider(item: Pack, query: Tensor, key: Tensor, value: Tensor, options: ScoreOptions) -> Tensor:
        assert options.window is not None
        return exact(item, query, key, value, options._replace(window=options.window + 1))

    # The model's window is longer than the sequences of the trial, which has a smaller one.
    assert obstacle(wider, heads(ScoreOptions(window=4096))) is not None
    assert obstacle(exact, heads(ScoreOptions(window=4096))) is None


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_flex_attention_has_the_outputs_of_all_scores(options: ScoreOptions) -> None:
    options = options._replace(window=options.window and 3)
    for item in pack(ROWS, width=11, mismatched=True):
        query, key, value = (states.detach() for states in attention_choice._inputs(item, heads(dtype=torch.float64)))
        with torch.no_grad():  # PyTorch has no backward pass of it for CPUs
            found = flex_attend(query, key, value, block_mask(item, options.window), options)
        torch.testing.assert_close(found, dense_attention(item, query, key, value, options), rtol=0, atol=1e-12)


def test_the_scores_that_the_trial_compares_with_are_those_of_the_tree() -> None:
    for item in pack(ROWS, width=11, mismatched=True):
        query, key, value = (states.detach() for states in attention_choice._inputs(item, heads(dtype=torch.float64)))
        for head in range(4):
            scores = (query[0, head] @ key[0, head // 2].T) / 4
            for token in (0, len(item.input_ids) // 2, len(item.input_ids) - 1):
                seen = visible(item, None)[token]
                expected = scores[token, seen].softmax(0) @ value[0, head // 2, seen]
                found = dense_attention(item, query, key, value, PLAIN)[0, head, token]
                torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def by_definition(
    query: Tensor, key: Tensor, value: Tensor, *, score_mod: Any, block_mask: Any, scale: Any, **_: Any
) -> Tensor:
    """FlexAttention by its definition, with gradients: the same functions of scores and of places, on all pairs."""
    groups = query.shape[1] // key.shape[1]
    key, value = (states.repeat_interleave(groups, 1) for states in (key, value))
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scale is None else scale)
    zero, queries, keys = torch.zeros(1), torch.arange(query.shape[2])[:, None], torch.arange(key.shape[2])
    if score_mod is not None:
        scores = score_mod(scores, zero, zero, queries, keys)
    return scores.masked_fill(~block_mask.mask_mod(zero, zero, queries, keys), -torch.inf).softmax(-1) @ value


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_kernels_that_keep_their_contract_are_accepted(
    options: ScoreOptions, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flex, "_flex_function", lambda device: by_definition)
    monkeypatch.setattr(varlen, "_varlen_function", lambda: one_by_one)
    assert obstacle(BY_FLEX, heads(options, dtype)) is None
    reason = obstacle(BY_VARLEN, heads(options, dtype))
    assert reason is None if options.softcap is None else str(reason).startswith("ValueError: expected scores without")


def test_a_cpu_has_neither_kernel() -> None:
    name, refused = first_exact(CANDIDATES, heads())
    assert (name, list(refused)) == ("pieces", ["flex", "varlen"])
    assert "not support" in refused["flex"]
    assert refused["varlen"].startswith("NotImplementedError")


def test_auto_makes_no_trial_on_a_cpu_and_one_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[Heads] = []
    monkeypatch.setattr(attention, "chosen_attention", lambda asked: tried.append(asked) or "varlen")
    (item,) = pack(ROWS, width=11)
    packed = PackedAttention(item, kernel="auto")
    query, key = torch.ones(1, 4, 7, 16), torch.ones(1, 2, 7, 16)
    assert packed._kernel_for(query, key, PLAIN) == "pieces"
    assert not tried
    on_cuda: Any = SimpleNamespace(shape=query.shape, dtype=torch.float32, device=torch.device("cuda", 0), is_cuda=True)
    assert packed._kernel_for(on_cuda, key, ScoreOptions(dropout=0.1)) == "pieces"
    assert not tried
    with torch.autocast("cuda", torch.float16, enabled=False):
        assert packed._kernel_for(on_cuda, key, PLAIN) == "varlen"
    assert tried == [Heads(torch.device("cuda", 0), torch.float32, 4, 2, 16, PLAIN)]


def test_the_trial_is_made_once_within_a_checkpointed_layer_and_is_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(attention_choice, "CANDIDATES", {"flex": raises, "varlen": exact})
    chosen_attention.cache_clear()
    runs = []

    def layer(states: Tensor) -> Tensor:
        runs.append(chosen_attention(heads()))
        return states.sin()

    states = torch.ones(3, requires_grad=True)
    before = torch.get_rng_state()
    try:
        with caplog.at_level(logging.INFO, "halos"), torch.autocast("cpu", torch.bfloat16):
            output: Any = checkpoint(layer, states, use_reentrant=False)
            output.sum().backward()
    finally:
        chosen_attention.cache_clear()
    assert runs == ["varlen", "varlen"]
    assert torch.equal(torch.get_rng_state(), before)
    (line,) = [record.getMessage() for record in caplog.records]
    where = "4 heads of width 16 in float32 on cpu"
    assert line == f"packed attention, {where}: varlen; not flex, RuntimeError: Failed to find C compiler."
    torch.testing.assert_close(states.grad, torch.ones(3).cos())
