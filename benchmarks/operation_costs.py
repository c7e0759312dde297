"""Measures every operation of a computation by its cause, and the time between operations."""

from __future__ import annotations

import resource
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from mmap import mmap
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.roofline import Clock, Product
from halos.estimation.tracer import OPERATIONS, READ_IN_PART

PRODUCTS = ("mm", "addmm", "bmm", "_linear_pointwise", "addmm_")
CONVERSIONS = ("_to_copy", "copy_")
OPTIMIZER = ("_fused_adam", "_foreach_")
ATTENTION = "_scaled_dot_product"
NEW_BYTES = 2**26
JOINS = ("cat", "split_with_sizes_backward")
"""Operations that join the gradients of attention's pieces in the backward pass."""


@dataclass
class Cost:
    """Operations of one cause: their number, seconds, page faults, floating-point operations and bytes moved."""

    calls: int = 0
    seconds: float = 0.0
    faults: int = 0
    operations: float = 0.0
    moved: float = 0.0


@dataclass
class Costs:
    """Costs by cause, the seconds between operations by stage, and products by their sizes."""

    causes: dict[str, Cost] = field(default_factory=lambda: defaultdict(Cost))
    between: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    products: dict[Product, float] = field(default_factory=lambda: defaultdict(float))
    names: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    views: int = 0
    """The number of views, which move nothing and are not measured."""


class Kind(NamedTuple):
    """What operations on tensors of the same sizes have in common."""

    name: str
    cause: str
    operations: float
    moved: int
    product: Product | None


class Watch(TorchDispatchMode):
    """Within this mode every operation is measured.

    The mode's own work disturbs the caches of the run, so it is kept small: during the run it only sums by kind of
    operation, and :meth:`take` sums the kinds by cause.

    Args:
        clock: returns nanoseconds.
        stages: the current stages, the innermost last.
    """

    def __init__(self, clock: Clock, stages: list[str]) -> None:
        super().__init__()
        self._clock, self._stages = clock, stages
        self._kinds: dict[tuple[object, ...], Kind] = {}
        self._sums: dict[tuple[object, ...], list[int]] = {}
        self._between: dict[str, int] = defaultdict(int)
        self._end = self._views = 0

    def __enter__(self) -> Any:
        self._end = self._clock()
        return super().__enter__()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if not isinstance(func, OpOverload) or func.is_view:
            self._views += 1
            return func(*args, **(kwargs or {}))
        faults, start = page_faults(), self._clock()
        out = func(*args, **(kwargs or {}))
        end = self._clock()
        stage = self._stages[-1]
        self._between[stage] += start - self._end
        key = (func, stage, *map(_sizes, args), *map(_sizes, kwargs.values() if kwargs else ()))
        sums = self._sums.get(key)
        if sums is None:
            self._kinds[key] = kind(func, stage, args, kwargs or {}, out)
            sums = self._sums[key] = [0, 0, 0]
        sums[0] += 1
        sums[1] += end - start
        sums[2] += page_faults() - faults
        self._end = self._clock()  # the bookkeeping above is not counted as time between operations
        return out

    def take(self) -> Costs:
        """Return what was measured since the last call."""
        found = Costs(views=self._views)
        for key, (calls, nanoseconds, faults) in self._sums.items():
            own, seconds = self._kinds[key], nanoseconds / 1e9
            cost = found.causes[own.cause]
            cost.calls += calls
            cost.seconds += seconds
            cost.faults += faults
            cost.operations += calls * own.operations
            cost.moved += calls * own.moved
            found.names[own.name] += seconds
            if own.product is not None:
                found.products[own.product] += calls * own.operations
        found.between.update({stage: nanoseconds / 1e9 for stage, nanoseconds in self._between.items()})
        self._sums.clear()
        self._between.clear()
        self._views = 0
        return found


def _sizes(value: Any) -> object:
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype
    if isinstance(value, list | tuple):
        return tuple(map(_sizes, value))
    return value if isinstance(value, int) else type(value)  # an integer may be a size


def kind(func: OpOverload, stage: str, args: Any, kwargs: Any, out: Any) -> Kind:
    """The kind of an operation: its name and cause, its number of floating-point operations, and the bytes it moves."""
    name = func._schema.name.partition("::")[2]
    made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
    read = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    formula = OPERATIONS.get(func._overloadpacket)
    operations = float(formula(*args, **kwargs, out_val=out)) if formula else 0.0
    moved = sum(map(_bytes, [*made, *(made if name in READ_IN_PART else read)]))
    product = None
    if name in PRODUCTS and read[-1].ndim == 2 and operations:
        n = made[0].shape[-1]
        rows = made[0].numel() // n
        product = Product(rows, round(operations / (2 * rows * n)), n)
    return Kind(f"{stage}: {name}", cause(name, stage, read, made), operations, moved, product)


def cause(name: str, stage: str, read: list[Tensor], made: list[Tensor]) -> str:
    """The cause to which the time of an operation is counted."""
    if stage == "optimizer" or name.startswith(OPTIMIZER):
        return "optimizer and clipping"
    if name in PRODUCTS:
        return "products"
    if name.startswith(ATTENTION):
        return "attention"
    if stage == "head":
        return "reductions of the head"
    if name in CONVERSIONS and len({tensor.dtype for tensor in [*read, *made]}) > 1:
        return "conversions"
    if stage == "attention" or (stage == "backward" and name in JOINS):
        return "pieces of attention"
    return "elementwise operations and copies"


def _bytes(tensor: Tensor) -> int:
    # An expanded tensor takes less memory than its shape suggests.
    return min(tensor.nbytes, tensor.untyped_storage().nbytes())


def page_faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def overhead(clock: Clock, calls: int = 20_000) -> dict[str, float]:
    """Seconds that measuring adds to an operation and to a view, in the recorded time and outside of it."""
    x, y = torch.ones(4), torch.ones(4)

    def seconds(function: Callable[[], Any]) -> float:
        start = clock()
        for _ in range(calls):
            function()
        return (clock() - start) / 1e9 / calls

    plain, plain_view = seconds(lambda: torch.add(x, y, alpha=2)), seconds(x.t)
    with Watch(clock, ["rest"]) as watch:
        _, watched_view = seconds(lambda: torch.add(x, y, alpha=2)), seconds(x.t)
    costs = watch.take()
    recorded = sum(cost.seconds for cost in costs.causes.values()) / calls
    between = sum(costs.between.values()) / calls
    return {"operation": recorded + between - plain, "view": watched_view - plain_view}


def fault_seconds(clock: Clock) -> float:
    """Additional seconds of the first write to a page of new memory."""
    block = torch.frombuffer(mmap(-1, NEW_BYTES), dtype=torch.uint8)
    faults, start = page_faults(), clock()
    block.fill_(1)
    new, end = page_faults() - faults, clock()
    block.fill_(2)
    return (2 * end - start - clock()) / 1e9 / max(new, 1)
