"""A batch of four pairs with token log-probs in float64, and the same numbers as plain Python lists."""

import math

import pytest
import torch
from torch import Tensor

from halos.data.batches.batch import Batch
from halos.data.batches.collate import collate
from halos.data.rows.token_rows import Row
from halos.metrics import Mean
from halos.policy.logprobs.completions import LogProbs

LENGTHS = ((3, 1), (2, 4), (1, 2), (4, 4))
_generator = torch.Generator().manual_seed(3)
POLICY, REFERENCE = (
    [
        [(-2.5 * torch.rand(n, dtype=torch.float64, generator=_generator) - 0.05).tolist() for n in lengths]
        for lengths in LENGTHS
    ]
    for _ in range(2)
)
"""log π of each token of the chosen and of the rejected completion of each pair."""


def pairs() -> tuple[Batch, LogProbs, LogProbs]:
    """(batch, policy's, reference's) of the numbers above."""
    rows = [Row(str(i), i, (1,), tuple(tuple(range(2, 2 + n)) for n in lengths)) for i, lengths in enumerate(LENGTHS)]
    batch = collate(rows)
    return batch, LogProbs(_grid(POLICY), batch.mask), LogProbs(_grid(REFERENCE), batch.mask)


def _grid(values: list[list[list[float]]]) -> Tensor:
    padded = [[branch + [0.0] * (4 - len(branch)) for branch in pair] for pair in values]
    return torch.tensor(padded, dtype=torch.float64)


def sums(values: list[list[list[float]]], *, mean: bool = False) -> list[tuple[float, float]]:
    """(chosen, rejected) of each pair, summed or averaged over tokens."""
    return [tuple(math.fsum(branch) / (len(branch) if mean else 1) for branch in pair) for pair in values]  # type: ignore[misc]


def log_ratios(*, mean: bool = False) -> list[tuple[float, float]]:
    """(chosen, rejected) of policy against reference, summed or averaged over tokens."""
    ours, theirs = sums(POLICY, mean=mean), sums(REFERENCE, mean=mean)
    return [(a - c, b - d) for (a, b), (c, d) in zip(ours, theirs, strict=True)]


def columns(of_pairs: list[tuple[float, float]]) -> tuple[Tensor, Tensor]:
    """Tensors [B] of the chosen and of the rejected."""
    chosen, rejected = zip(*of_pairs, strict=True)
    return torch.tensor(chosen, dtype=torch.float64), torch.tensor(rejected, dtype=torch.float64)


def assert_term(term: Mean, values: list[float]) -> None:
    """The term is the mean of these values over the step."""
    assert float(term.total / term.step_count) == pytest.approx(math.fsum(values) / len(values), rel=1e-13)


def nll_of_chosen() -> list[float]:
    """−log π_θ of every token of the chosen completions."""
    return [-value for pair in POLICY for value in pair[0]]
