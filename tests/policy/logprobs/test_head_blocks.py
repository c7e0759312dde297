"""The LM head's chunks as a GPU computes them: in blocks of bytes, with other operations than on a CPU."""

from __future__ import annotations

import pytest
import torch

from halos.estimation.tracer import Tracer
from halos.policy.kernels.device_types import traced_as
from halos.policy.logprobs import chunked_head
from halos.policy.logprobs.chunked_head import LogitShape, chunked_logprobs
from halos.training.gpus import GPUS
from tests.policy.logprobs.test_head import SHAPES, VOCABULARY, tensors, whole


def on_a_gpu(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    """Let a CPU compute the chunks as a GPU does, in blocks of this many rows."""
    monkeypatch.setattr(chunked_head, "device_type", lambda tensor: "cuda")
    monkeypatch.setattr(chunked_head, "BLOCK_BYTES", rows * 4 * VOCABULARY)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("block", [1, 3, 100])
def test_a_gpus_blocks_give_the_same(block: int, shape: LogitShape, monkeypatch: pytest.MonkeyPatch) -> None:
    states, weight, _, targets = tensors()
    expected = whole(states, weight, None, targets, shape)
    on_a_gpu(monkeypatch, block)
    found, _ = chunked_logprobs(states, weight, None, targets, rows=4, shape=shape)
    torch.testing.assert_close(found, expected)
    gradients = (torch.autograd.grad(x.sin().sum(), (states, weight)) for x in (found, expected))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gpu_has_no_second_copy_of_the_logits(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, vocabulary = 512, 2**16
    monkeypatch.setattr(chunked_head, "BLOCK_BYTES", 8 * 4 * vocabulary)
    with torch.device("meta"):
        states, weight = (torch.empty(n, 8, dtype=dtype, requires_grad=True) for n in (tokens, vocabulary))
        targets, grad = torch.empty(tokens, dtype=torch.long), torch.empty(tokens)
    with traced_as("cuda"), Tracer({}, GPUS["h100"], vocabulary) as tracer:
        logprobs, _ = chunked_logprobs(states, weight, None, targets, rows=tokens)
        torch.autograd.backward(logprobs, grad)
    chunk = tokens * (vocabulary + 16) * dtype.itemsize  # each row has a gap
    # And two float32 blocks: logits and their log-probs.
    assert chunk < tracer.memory.peak["logits"] <= chunk + 2 * chunked_head.BLOCK_BYTES < 1.1 * chunk


@pytest.mark.parametrize("block", [3, 100])
def test_bf16_is_rounded_only_where_it_is_written(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    states, weight, _, targets = tensors(torch.bfloat16)
    wide = [tensor.detach().double().requires_grad_() for tensor in (states, weight)]
    expected = whole(wide[0], wide[1], None, targets, LogitShape())
    on_a_gpu(monkeypatch, block)
    found, _ = chunked_logprobs(states, weight, None, targets, rows=4)
    assert found.dtype == torch.float32
    # The logits are rounded to 8 bits, and neither their normaliser nor their difference is.
    largest = (wide[0] @ wide[1].T).detach().abs().max()
    assert (found - expected).abs().max() < 2**-7 * largest
    gradients = (torch.autograd.grad(x.sum(), inputs) for x, inputs in ((found, (states, weight)), (expected, wide)))
    for one, other in zip(*gradients, strict=True):
        assert (one - other).norm() < 0.01 * other.norm()
