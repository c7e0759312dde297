"""Losses in which an example depends on the other examples of its micro-step, on all ranks, with gradient.

Every rank computes the losses of all examples. The value of the rank's loss counts only its own examples. The losses of
the others' examples add only their gradient with respect to the rank's own examples.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from halos.metrics import Mean
from halos.processes.collectives import all_gather_list, data_rank_and_world


def of_all_ranks(column: Tensor) -> Tensor:
    """Return the values of all ranks, [N], rank by rank. Only this rank's own, ``column`` [B], have a gradient."""
    this_rank, world = data_rank_and_world()
    if world == 1:  # no exchange: reading the values would make the host wait for the device
        return column
    ranks = all_gather_list([column.tolist()])
    return torch.cat([column if rank == this_rank else column.new_tensor(values) for rank, values in enumerate(ranks)])


def own_places(size: int) -> slice:
    """Return the places of this rank's ``size`` examples among those of all ranks."""
    start = sum(all_gather_list([size])[: data_rank_and_world()[0]])
    return slice(start, start + size)


def with_others_gradient(mean: Mean, losses: Tensor, weights: Tensor, mine: slice) -> Mean:
    """Add to the mean of this rank's losses the gradient, but not the value, of the other ranks' losses.

    Args:
        mean: the mean of this rank's losses, made with ``per_example``.
        losses: the losses of all ranks' examples, [N].
        weights: the weights of all ranks' examples, [N].
        mine: the places of this rank's examples.
    """
    gradient = weights * (losses - losses.detach())
    return replace(mean, total=mean.total + gradient.sum() - gradient[mine].sum())
