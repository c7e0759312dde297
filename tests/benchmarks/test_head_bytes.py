"""The formula of the bytes that the LM head moves counts the operations that PyTorch is called for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.head_bytes import Head, bytes_table, least, moved
from halos.policy.kernels.device_types import traced_as
from halos.policy.logprobs import chunked_head
from halos.policy.logprobs.chunked_head import chunked_logprobs


class Bytes(TorchDispatchMode):
    """Counts what operations read and write: their arguments but those that they only overwrite, and their results."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(
        self,
        func: Callable[..., object],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> object:
        out = func(*args, **(kwargs or {}))
        assert isinstance(func, OpOverload)
        name = func._schema.name.removeprefix("aten::")
        if func.is_view or name.startswith(("empty", "new_empty")):
            return out
        # Not what is overwritten: the first argument of copy_(), and ``out``, which is a keyword.
        read = [] if name == "zeros_like" else [*args[name == "copy_" :]]
        written = tree_leaves(out)
        if name in ("gather", "scatter_"):  # single numbers, chosen by an index
            read, written = [args[2]] * 2, [args[2]]
        self.total += sum(t.numel() * t.itemsize for t in (*tree_leaves(read), *written) if isinstance(t, Tensor))
        return out


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rows", [64, 256, 1000])
def test_the_bytes_are_those_of_the_traced_operations(
    rows: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens, hidden, vocabulary = 600, 96, 4096
    monkeypatch.setattr(chunked_head, "BLOCK_BYTES", 32 * 4 * vocabulary)
    with torch.device("meta"):
        states = torch.empty(tokens, hidden, dtype=dtype, requires_grad=True)
        weight = torch.empty(vocabulary, hidden, dtype=dtype, requires_grad=True)
        targets, grad = torch.empty(tokens, dtype=torch.long), torch.empty(tokens)
    with traced_as("cuda"), Bytes() as counted:
        logprobs, _ = chunked_logprobs(states, weight, None, targets, rows=rows)
        torch.autograd.backward(logprobs, grad)
    formula = moved(Head(tokens=tokens, hidden=hidden, vocabulary=vocabulary, itemsize=dtype.itemsize), rows)
    # What is left is a few numbers for each token, such as its normaliser.
    assert counted.total == pytest.approx(tokens * formula.total, rel=0.002)


def test_the_least_is_less_and_more_rows_come_closer() -> None:
    head = Head(tokens=8192, hidden=4096, vocabulary=32_000, itemsize=2)
    counts = [moved(head, rows) for rows in (512, 4096, 8192)]
    assert counts[0].weights > 6 * counts[1].weights > 8 * counts[2].weights > 16 * least(head).weights
    assert counts[0].total > counts[1].total > counts[2].total > least(head).total
    assert least(head).logits == 12 * 32_000


def test_the_table_has_a_line_for_each_number_of_rows() -> None:
    lines = bytes_table(4096, [512, 4096]).splitlines()
    assert len(lines) == 2 + 3 * 3
    assert [line.split("|")[2].strip() for line in lines[2:5]] == ["512", "4,096", "least"]
