"""Log-probs against plain forwards of one sequence at a time, for each architecture."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from halos.data.batches import collate as batches
from halos.data.batches.batch import Batch
from halos.data.batches.collate import collate
from halos.data.rows.token_rows import Row
from halos.policy.logprobs.completions import LogProbs, completion_logprobs
from halos.policy.logprobs.head import HeadOptions
from tests import tiny

ROWS = tiny.rows(5, branches=2)
EXACT = 1e-10
"""Of float64 models. A leak of padding or of a neighbour moves values and gradients by 1e-3 and more."""
IN_FLOAT32 = 5e-5
"""Of Gemma, whose own code has its norms' weights and its eager softmax in float32 even so."""


@pytest.fixture(scope="module", params=tiny.ARCHITECTURES)
def model(request: pytest.FixtureRequest) -> Any:
    return tiny.model(request.param, dtype=torch.float64)


@pytest.fixture(scope="module")
def llama() -> Any:
    return tiny.model("llama", dtype=torch.float64)


def tolerance(model: Any) -> float:
    return IN_FLOAT32 if model.config.model_type.startswith("gemma") else EXACT


@torch.no_grad()
def one_at_a_time(model: Any, row: Row, branch: tuple[int, ...]) -> list[float]:
    """log π of each token of the branch, from the whole logits of a batch of one."""
    logits = model(input_ids=torch.tensor([row.prompt + branch])).logits[0]
    logprobs = torch.log_softmax(logits.double(), -1)
    return [float(logprobs[len(row.prompt) - 1 + t, token]) for t, token in enumerate(branch)]


@pytest.mark.parametrize("packing", [False, True])
def test_of_several_turns_the_scored_tokens_have_log_probs_after_all_before_them(llama: Any, packing: bool) -> None:
    row = Row("r0", 0, (5, 6), ((8, 9, 10, 11, 12), (13, 3)), context=(((1, 3),), ()))
    found = completion_logprobs(llama, collate([row, *ROWS], packing=packing)).tokens[0]
    first, second = (one_at_a_time(llama, row, branch) for branch in row.branches)
    expected = torch.tensor([[first[0], first[3], first[4]], [*second, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(found[:, :3], expected, rtol=0, atol=EXACT)
    assert not found[:, 3:].any()


def weights(rows: list[Row], width: int) -> Tensor:
    """A number for each token of each row that goes with the row, whatever its place in the batch."""
    made = []
    for row in rows:
        generator = torch.Generator().manual_seed(int(row.id[1:]))
        made.append(torch.randn(len(row.branches), 20, generator=generator, dtype=torch.float64)[:, :width])
    return torch.stack(made)


def gradients(model: Any, batch: Batch, rows: list[Row]) -> tuple[LogProbs, list[Tensor]]:
    logprobs = completion_logprobs(model, batch)
    loss = (logprobs.tokens * weights(rows, logprobs.tokens.shape[-1])).sum()
    return logprobs, list(torch.autograd.grad(loss, list(model.parameters())))


def by_row(logprobs: LogProbs, rows: list[Row]) -> dict[str, list[Tensor]]:
    return {
        row.id: [logprobs.tokens[b, k, : len(branch)].detach() for k, branch in enumerate(row.branches)]
        for b, row in enumerate(rows)
    }


def assert_same_rows(mine: dict[str, list[Tensor]], other: dict[str, list[Tensor]], within: float) -> None:
    for name in mine.keys() & other.keys():
        assert_same(mine[name], other[name], within)


def assert_same(mine: Sequence[Tensor], other: Sequence[Tensor], within: float) -> None:
    for left, right in zip(mine, other, strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=within)


# Values


@pytest.mark.parametrize("mismatched", [False, True])
@pytest.mark.parametrize("chunks", [1, 3])
def test_they_are_those_of_one_plain_sequence_at_a_time(model: Any, chunks: int, mismatched: bool) -> None:
    logprobs = completion_logprobs(model, collate(ROWS, chunks=chunks, mismatched=mismatched))
    assert logprobs.tokens.dtype == torch.float64
    for b, row in enumerate(ROWS):
        for k, branch in enumerate(row.branches):
            expected = one_at_a_time(model, row, branch)
            assert logprobs.tokens[b, k, : len(branch)].tolist() == pytest.approx(expected, rel=0, abs=tolerance(model))
            assert logprobs.tokens[b, k, len(branch) :].eq(0).all()
            assert logprobs.sum[b, k].item() == pytest.approx(sum(expected), rel=0, abs=10 * tolerance(model))
            assert int(logprobs.count[b, k]) == len(branch)


def test_predictions_are_far_from_uniform(model: Any) -> None:
    # Otherwise the comparisons above would show little.
    logprobs = completion_logprobs(model, collate(ROWS))
    assert logprobs.tokens[logprobs.mask].std() > 0.2


def test_probabilities_of_all_continuations_add_up_to_one(model: Any) -> None:
    rows = [Row(f"r{token}", 0, (5, 6), ((7, token),)) for token in range(tiny.VOCABULARY)]
    logprobs = completion_logprobs(model, collate(rows, chunks=4))
    assert logprobs.tokens[:, 0, 1].exp().sum().item() == pytest.approx(1, abs=tolerance(model))


def test_the_sliding_window_is_kept() -> None:
    mistral = tiny.model("mistral", dtype=torch.float64, num_hidden_layers=1)
    near, far = tiny.WINDOW, tiny.WINDOW + 1  # as far back as the token that predicts the last one can see, and beyond
    ids = tuple(range(10, 22))

    def last(changed: int | None) -> float:
        prompt = list(ids)
        if changed is not None:
            prompt[-changed] = 60
        return completion_logprobs(mistral, collate([Row("r0", 0, tuple(prompt), ((9,),))])).sum.item()

    assert last(far) == pytest.approx(last(None), rel=0, abs=EXACT)
    assert abs(last(near) - last(None)) > 1e-6


def test_soft_capping_is_kept() -> None:
    capped = tiny.model("gemma2", dtype=torch.float64)
    row = Row("r0", 0, (5,), tuple((token,) for token in range(tiny.VOCABULARY)))
    logprobs = completion_logprobs(capped, collate([row])).sum
    assert (logprobs.max() - logprobs.min()).item() <= 2 * capped.config.final_logit_softcapping


# What must not matter


def test_values_and_gradients_do_not_depend_on_the_number_of_chunks(model: Any) -> None:
    first, expected = gradients(model, collate(ROWS, chunks=1), ROWS)
    for chunks in (2, 4, 10):
        other, found = gradients(model, collate(ROWS, chunks=chunks), ROWS)
        assert_same([other.tokens], [first.tokens], tolerance(model))
        assert_same(found, expected, tolerance(model))


def test_values_and_gradients_do_not_depend_on_the_order_of_rows(model: Any) -> None:
    turned = [ROWS[i] for i in (3, 0, 4, 2, 1)]
    first, expected = gradients(model, collate(ROWS, chunks=2), ROWS)
    other, found = gradients(model, collate(turned, chunks=2), turned)
    assert_same_rows(by_row(first, ROWS), by_row(other, turned), tolerance(model))
    assert_same(found, expected, tolerance(model))


def test_values_and_gradients_do_not_depend_on_padding(model: Any) -> None:
    alone = ROWS[:3]
    long = Row("r9", 9, tuple(range(20)), (tuple(range(19)), (1,)))
    first, expected = gradients(model, collate(alone), alone)
    whole, together = gradients(model, collate([*alone, long]), [*alone, long])
    _, of_long = gradients(model, collate([long]), [long])
    assert whole.tokens.shape[-1] > first.tokens.shape[-1]
    assert_same_rows(by_row(first, alone), by_row(whole, [*alone, long]), tolerance(model))
    assert_same(together, [left + right for left, right in zip(expected, of_long, strict=True)], tolerance(model))


def test_micro_batches_add_up_to_one_batch(model: Any) -> None:
    _, expected = gradients(model, collate(ROWS), ROWS)
    parts = [gradients(model, collate([row]), [row])[1] for row in ROWS]
    assert_same([torch.stack(part).sum(0) for part in zip(*parts, strict=True)], expected, tolerance(model))


@pytest.mark.parametrize("pad", [1, 5, tiny.VOCABULARY - 1])
def test_the_id_that_pads_does_not_matter(model: Any, pad: int, monkeypatch: pytest.MonkeyPatch) -> None:
    first, expected = gradients(model, collate(ROWS), ROWS)
    monkeypatch.setattr(batches, "PAD", pad)
    batch = collate(ROWS)
    assert (batch.chunks[0].input_ids == pad).sum() > 5
    other, found = gradients(model, batch, ROWS)
    assert torch.equal(other.tokens, first.tokens)
    assert_same(found, expected, tolerance(model))


def test_rows_of_nothing_but_the_pad_id_are_scored(llama: Any) -> None:
    row = Row("r0", 0, (batches.PAD,) * 3, ((batches.PAD,) * 4,))
    logprobs = completion_logprobs(llama, collate([row, *tiny.rows(3)]))
    expected = one_at_a_time(llama, row, row.branches[0])
    assert logprobs.tokens[0, 0, :4].tolist() == pytest.approx(expected, rel=0, abs=EXACT)


# Gradients


def test_they_are_those_of_a_plain_forward(model: Any) -> None:
    (row,) = tiny.rows(1, seed=4)
    branch = torch.tensor(row.branches[0])
    logits = model(input_ids=torch.tensor([row.prompt + row.branches[0]])).logits[0, len(row.prompt) - 1 : -1]
    loss = torch.log_softmax(logits, -1)[torch.arange(len(branch)), branch].sum()
    expected = torch.autograd.grad(loss, list(model.parameters()))
    found = torch.autograd.grad(completion_logprobs(model, collate([row])).sum.sum(), list(model.parameters()))
    assert_same(found, expected, tolerance(model))


def test_mismatched_completions_carry_no_gradient(model: Any) -> None:
    parameters = list(model.parameters())
    logprobs = completion_logprobs(model, collate(ROWS, mismatched=True, chunks=2))
    for gradient in torch.autograd.grad(logprobs.sum[:, 1].sum(), parameters, retain_graph=True, allow_unused=True):
        assert gradient is None or gradient.eq(0).all()
    found = torch.autograd.grad(logprobs.sum.sum(), parameters)
    first = [Row(row.id, row.group, row.prompt, row.branches[:1]) for row in ROWS]
    expected = torch.autograd.grad(completion_logprobs(model, collate(first)).sum.sum(), parameters)
    assert max(float(gradient.abs().max()) for gradient in expected) > 0.1
    assert_same(found, expected, tolerance(model))


# Precision


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_a_bf16_model_gives_float32_results(architecture: str) -> None:
    model = tiny.model(architecture, dtype=torch.bfloat16)
    logprobs = completion_logprobs(model, collate(ROWS, chunks=2, mismatched=True))
    assert logprobs.tokens.dtype == logprobs.sum.dtype == torch.float32
    # Rounded once, in the logits: log-softmax and sums of bf16 would be on a grid of 2^-6 at these sizes.
    tokens = logprobs.tokens[logprobs.mask]
    assert (tokens != tokens.bfloat16().float()).float().mean() > 0.9
    exact = completion_logprobs(model.double(), collate(ROWS, chunks=2, mismatched=True))
    torch.testing.assert_close(logprobs.tokens.double(), exact.tokens, rtol=0, atol=0.2)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2"])
def test_autocast_gives_float32_results_and_every_gradient(architecture: str) -> None:
    model = tiny.model(architecture)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logprobs = completion_logprobs(model, collate(ROWS, chunks=2, mismatched=True))
    assert logprobs.tokens.dtype == torch.float32
    logprobs.sum[:, 0].sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


# Hidden states


@pytest.mark.parametrize("chunks", [1, 4])
def test_hidden_states_are_those_that_predict_each_token(model: Any, chunks: int) -> None:
    logprobs = completion_logprobs(model, collate(ROWS, chunks=chunks, mismatched=True), HeadOptions(with_states=True))
    assert logprobs.hidden is not None
    assert logprobs.hidden.shape == (*logprobs.mask.shape, 16)
    assert not logprobs.hidden.requires_grad
    assert logprobs.hidden[~logprobs.mask].eq(0).all()
    for b, row in enumerate(ROWS):
        for k, branch in enumerate(row.branches):
            with torch.no_grad():
                states = model.base_model(input_ids=torch.tensor([row.prompt + branch])).last_hidden_state[0]
            expected = states[len(row.prompt) - 1 : -1]
            assert_same([logprobs.hidden[b, k, : len(branch)]], [expected], tolerance(model))


def test_hidden_states_through_the_head_give_the_log_probs(llama: Any) -> None:
    batch = collate(ROWS)
    logprobs = completion_logprobs(llama, batch, HeadOptions(with_states=True))
    logits = llama.get_output_embeddings()(logprobs.hidden)
    for b, row in enumerate(ROWS):
        for k, branch in enumerate(row.branches):
            found = logits[b, k, : len(branch)].log_softmax(-1)[torch.arange(len(branch)), torch.tensor(branch)]
            torch.testing.assert_close(found, logprobs.tokens[b, k, : len(branch)], rtol=0, atol=EXACT)


def test_no_hidden_states_unless_asked_for(llama: Any) -> None:
    assert completion_logprobs(llama, collate(ROWS)).hidden is None


# The hook on the head


def test_the_head_is_applied_to_scored_positions_only(llama: Any) -> None:
    seen = []
    handle = llama.get_output_embeddings().register_forward_hook(lambda _, __, out: seen.append(out.shape))
    batch = collate(ROWS, chunks=2)
    completion_logprobs(llama, batch)
    handle.remove()
    assert seen == [(1, len(chunk.targets), tiny.VOCABULARY) for chunk in batch.chunks]


def test_the_hook_is_gone_afterwards(model: Any) -> None:
    completion_logprobs(model, collate(ROWS))
    assert not model.get_output_embeddings()._forward_pre_hooks
    assert model(input_ids=torch.tensor([[1, 2, 3]])).logits.shape == (1, 3, tiny.VOCABULARY)


def test_the_hook_is_gone_after_an_error(llama: Any) -> None:
    with pytest.raises(IndexError):
        completion_logprobs(llama, collate([Row("r0", 0, (tiny.VOCABULARY,), ((1,),))]))
    assert not llama.get_output_embeddings()._forward_pre_hooks
