"""Divides the rows of the LM head over a tensor-parallel group, whose devices all have the same states.

    states [M, H] ── device 0: rows 0 … M/2 ──→ log-probs ──┐
                  └─ device 1: rows M/2 … M ──→ log-probs ──┴→ log-probs [M] on both

A device computes M/n rows of logits, and the group exchanges one number for each token. In the backward pass it
exchanges the gradient of the states. The vocabulary could be divided instead. This would need as many products, but the
devices would exchange maxima, sums and, from each device, a gradient of all states.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, cast

import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.distributed import ProcessGroup, all_gather_into_tensor


class RowShare:
    """This device's share of M rows. The shares have equal sizes; the last ones may end with rows of zeros.

    Args:
        group: the devices, all of which have the same rows.
        rows: the number M of rows.
    """

    def __init__(self, group: ProcessGroup, rows: int) -> None:
        self.group, self.rows = group, rows
        self.size = -(-rows // group.size())
        self.start = group.rank() * self.size

    def take(self, rows: Tensor) -> Tensor:
        """Return this device's part of rows [M, …]. The backward pass joins the gradients of all devices' parts."""
        return _take(rows, self)

    def gather(self, results: Tensor) -> Tensor:
        """Return the results of all rows [M, …] from those of this device's part."""
        return _gather(results, self)

    def slice_of(self, rows: Tensor) -> Tensor:
        """Return this device's part of rows [M, …]."""
        missing = self.size * self.group.size() - self.rows
        padded = F.pad(rows, (0, 0) * (rows.ndim - 1) + (0, missing)) if missing else rows
        return padded[self.start : self.start + self.size]

    def all_of(self, part: Tensor) -> Tensor:
        """Exchange the parts [M / n, …] of all devices and return the rows [M, …]."""
        rows = part.new_empty(self.size * self.group.size(), *part.shape[1:])
        all_gather_into_tensor(rows, part.contiguous(), group=self.group)
        return rows[: self.rows]


# FSDP2 averages the gradient of the head's weight over all devices, as if each had computed all rows. Here each device
# has computed only its own rows, so the sum is needed: the gradients of the results are multiplied by the number of
# devices. Every device gets the whole gradient of the states, so that one is divided by the same number again.


class _Context(Protocol):
    share: RowShare


class _Take(Function):
    @staticmethod
    def forward(ctx: _Context, rows: Tensor, share: RowShare) -> Tensor:
        ctx.share = share
        return share.slice_of(rows).clone()

    @staticmethod
    def backward(ctx: _Context, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.share.all_of(gradients[0]) / ctx.share.group.size(), None


class _Gather(Function):
    @staticmethod
    def forward(ctx: _Context, results: Tensor, share: RowShare) -> Tensor:
        ctx.share = share
        return share.all_of(results)

    @staticmethod
    def backward(ctx: _Context, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.share.slice_of(gradients[0]) * ctx.share.group.size(), None


_Shared = Callable[[Tensor, RowShare], Tensor]
_take, _gather = cast("_Shared", _Take.apply), cast("_Shared", _Gather.apply)
