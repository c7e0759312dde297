"""A head whose rows are divided over processes computes what one process does, with the same gradients."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from halos.policy.logprobs import head as heads
from halos.policy.logprobs.chunked_head import LogitShape
from halos.policy.logprobs.head import HeadOptions, forward_scored
from tests.fork import run_ranks

WIDTH, VOCABULARY = 5, 11
Results = tuple[Tensor, ...]


class Model(nn.Module):
    """Only a head: its states are passed as they are."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.head = nn.Linear(WIDTH, VOCABULARY, dtype=torch.float64)
        for parameter in self.head.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)

    def get_output_embeddings(self) -> nn.Linear:
        return self.head


def results(rows: int, group: dist.ProcessGroup | None) -> Results:
    """Log-probs, entropies, and the gradients of states, weight and bias."""
    model: Any = Model()
    heads._shapes[model] = LogitShape(0.5, cap=4.0)
    generator = torch.Generator().manual_seed(rows)
    states = torch.randn(rows, WIDTH, generator=generator, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(VOCABULARY, (rows,), generator=generator)

    def forward(**_: Any) -> Any:
        return SimpleNamespace(logits=model.head(states[None]))

    options = HeadOptions(chunk_rows=2, statistics=("entropy",), group=group)
    scored, _ = forward_scored(model, forward, targets, lambda all_states: all_states[0], options)
    (scored.logprobs * torch.arange(1.0, rows + 1, dtype=torch.float64)).sum().backward()
    assert states.grad is not None
    gradients = [states.grad, *(parameter.grad for parameter in model.head.parameters())]
    return scored.logprobs.detach(), scored.statistics, *gradients


def divided(rows: int) -> Results:
    dist.init_process_group("gloo")
    logprobs, statistics, of_states, *of_weights = results(rows, dist.group.WORLD)
    for gradient in of_weights:  # as FSDP2 does: the mean over all devices
        dist.all_reduce(gradient)
        gradient /= dist.get_world_size()
    return logprobs, statistics, of_states, *of_weights


def by_hand(rows: int) -> Results:
    model = Model()
    generator = torch.Generator().manual_seed(rows)
    states = torch.randn(rows, WIDTH, generator=generator, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(VOCABULARY, (rows,), generator=generator)
    weight, bias = model.head.weight, model.head.bias
    log_softmax = F.log_softmax(4 * torch.tanh(0.5 * (states @ weight.T + bias) / 4), dim=1)
    logprobs = log_softmax[torch.arange(rows), targets]
    (logprobs * torch.arange(1.0, rows + 1, dtype=torch.float64)).sum().backward()
    entropy = -(log_softmax.exp() * log_softmax).sum(1, keepdim=True)
    gradients = [value.grad for value in (states, weight, bias) if value.grad is not None]
    return logprobs.detach(), entropy.detach(), *gradients


@pytest.mark.ranks
@pytest.mark.parametrize(("ranks", "rows"), [(2, 7), (2, 1), (3, 8)])
def test_divided_rows_give_the_results_and_gradients_of_whole_ones(ranks: int, rows: int) -> None:
    expected = by_hand(rows)
    for rank in run_ranks(partial(divided, rows), ranks):
        for found, value in zip(rank, expected, strict=True):
            torch.testing.assert_close(found, value, rtol=1e-9, atol=1e-12, check_dtype=False)


def test_one_process_computes_the_same() -> None:
    for found, value in zip(results(7, None), by_hand(7), strict=True):
        torch.testing.assert_close(found, value, rtol=1e-9, atol=1e-12, check_dtype=False)
