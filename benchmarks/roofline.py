"""The least time that operations and bytes take on this machine, at the rates that it reaches."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import torch

from halos.policy.kernels.matmul import affine

TRIES, SECONDS = 3, 0.15
LARGE = 2**25
"""The length of an array that does not fit into a cache."""


class Product(NamedTuple):
    """The sizes of a matrix product [rows, inner] · [inner, columns]."""

    rows: int
    inner: int
    columns: int


Clock = Callable[[], int]
"""Returns a time in nanoseconds."""


def clock_for(threads: int) -> Clock:
    """Return a clock: for one thread its own CPU time, which does not include other programs; else elapsed time."""
    return time.thread_time_ns if threads == 1 else time.perf_counter_ns


def roofline(
    precision: str,
    products: Mapping[Product, float],
    sizes: Collection[int],
    causes: Mapping[str, Mapping[str, float]],
    clock: Clock,
) -> dict[str, Any]:
    """Return the least seconds of each cause, and the rates from which they are calculated.

    Args:
        precision: the precision of the run.
        products: the number of operations in products of each size.
        sizes: all sizes of the model's weights. Any other size in a product is a number of tokens.
        causes: ``operations`` and bytes ``moved`` of each cause.
        clock: see :func:`clock_for`.
    """
    groups = group(products, sizes)
    rates = {product: rate(product, precision, clock) for product in groups}
    memory = bandwidth(clock)
    average = sum(groups.values()) / sum(operations / rates[product] for product, operations in groups.items())
    least = {
        cause: cost["operations"] / average if cost["operations"] else cost["moved"] / memory
        for cause, cost in causes.items()
    }
    return {
        "least": least,
        "bandwidth": memory,
        "rate": average,
        "rates": {" × ".join(map(str, product)): rates[product] for product in groups},
    }


def group(products: Mapping[Product, float], sizes: Collection[int]) -> dict[Product, float]:
    """Group products that differ only in their numbers of tokens. A group has the mean number of tokens."""
    kinds: dict[tuple[int | None, ...], list[tuple[Product, float]]] = defaultdict(list)
    for product, operations in products.items():
        kinds[tuple(size if size in sizes else None for size in product)].append((product, operations))
    groups: dict[Product, float] = defaultdict(float)
    for kind, members in kinds.items():
        total = sum(operations for _, operations in members)
        mean = (sum(p[n] * operations for p, operations in members) / total for n in range(3))
        own = (size or round(tokens) for size, tokens in zip(kind, mean, strict=True))
        groups[Product(*own)] += total
    return dict(groups)


def rate(product: Product, precision: str, clock: Clock) -> float:
    """Operations per second of a repeated product, by the library that is faster on this machine."""
    dtype = torch.float32 if precision == "32-true" else torch.bfloat16
    a = torch.randn(product.rows, product.inner).to(dtype)
    b = torch.randn(product.columns, product.inner).to(dtype)
    return 2 * product.rows * product.inner * product.columns / fastest(lambda: affine(a, b), clock)


def bandwidth(clock: Clock) -> float:
    """Bytes read and written per second in a sum of large arrays."""
    a, b = torch.ones(LARGE), torch.ones(LARGE)
    return 3 * a.nbytes / fastest(lambda: a.add_(b), clock)


def fastest(function: Callable[[], object], clock: Clock) -> float:
    """Seconds of a call, in the fastest of a few tries."""
    function()
    best = float("inf")
    for _ in range(TRIES):
        start, calls, elapsed = clock(), 0, 0
        while not calls or elapsed < SECONDS * 1e9:
            function()
            calls, elapsed = calls + 1, clock() - start
        best = min(best, elapsed / calls / 1e9)
    return best
