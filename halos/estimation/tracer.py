"""Follows the memory of a computation, and counts its operations and kernels, without running it."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch._ops import OpOverload, OpOverloadPacket
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import addmm_flop, flop_registry, mm_flop, sdpa_backward_flop, sdpa_flop

from halos.estimation.functions import HOST
from halos.testing.device_work import WITHOUT_KERNEL
from halos.training.gpus import GPU

aten = torch.ops.aten
READ_IN_PART = ("embedding", "index", "index_select", "gather")
"""Operations that read a few rows of their first argument."""


def _linear_operations(states: Tensor, weight: Tensor, *_: object, **__: object) -> int:
    rows = states.numel() // states.shape[-1]
    return int(mm_flop((rows, states.shape[-1]), tuple(weight.shape)[::-1]))


OTHER_OPERATIONS: dict[OpOverloadPacket, Callable[..., int]] = {
    aten.addmm_: addmm_flop,
    aten._scaled_dot_product_flash_attention_for_cpu: sdpa_flop,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: sdpa_backward_flop,
    torch.ops.mkldnn._linear_pointwise: _linear_operations,
}
"""Formulas of operations for which PyTorch has none."""
OPERATIONS = flop_registry | OTHER_OPERATIONS


@dataclass(slots=True)
class Work:
    """What was computed.

    Attributes:
        operations: floating-point operations of products and attention, as ``torch.utils.flop_counter`` counts them.
        kernels: operations that a device computes; views are none.
        seconds: by the published rates of a GPU: each kernel takes as long as its operations or as the memory that it
            reads and writes, whichever is longer.
    """

    operations: float = 0.0
    kernels: float = 0.0
    seconds: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(self.operations + other.operations, self.kernels + other.kernels, self.seconds + other.seconds)

    def __mul__(self, factor: float) -> Work:
        return Work(factor * self.operations, factor * self.kernels, factor * self.seconds)


@dataclass(slots=True)
class _Block:
    size: int
    label: str
    watch: weakref.ref[torch.UntypedStorage]


@dataclass(slots=True)
class Memory:
    """Bytes that are alive on a device, by label.

    Attributes:
        shares: by label the part of the traced bytes that one device holds; 1 unless given.
        alive: traced bytes by label.
        peak: bytes of the device at its fullest moment since the last :meth:`begin`, by label.
        host_peak: the most bytes of the host's memory since then.
    """

    shares: Mapping[str, float] = field(default_factory=dict)
    alive: Counter[str] = field(default_factory=Counter)
    peak: dict[str, float] = field(default_factory=dict)
    host_peak: float = 0.0
    _now: float = 0.0
    _most: float = 0.0

    def add(self, label: str, size: float) -> None:
        self.alive[label] += size  # type: ignore[assignment]  # bytes may be shares of bytes
        if label == HOST:
            self.host_peak = max(self.host_peak, self.alive[HOST])
            return
        self._now += size * self.shares.get(label, 1.0)
        if self._now > self._most:
            self._most, self.peak = self._now, self._parts()

    def begin(self) -> None:
        """Forget the peaks."""
        self._most, self.peak, self.host_peak = self._now, self._parts(), self.alive[HOST]

    def _parts(self) -> dict[str, float]:
        alive = {label: size for label, size in self.alive.items() if size and label != HOST}
        return {label: size * self.shares.get(label, 1.0) for label, size in alive.items()}


class Tracer(TorchDispatchMode):
    """Within this mode every operation is seen.

    Args:
        shares: see :class:`Memory`.
        gpu: whose rates the seconds are of.
        vocabulary: tensors of this many columns are labelled ``logits``.
    """

    def __init__(self, shares: Mapping[str, float], gpu: GPU, vocabulary: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.memory, self.work, self.label = Memory(shares), Work(), "activations"
        self._gpu, self._vocabulary = gpu, vocabulary
        self._blocks: dict[int, _Block] = {}

    @contextmanager
    def labelled(self, label: str) -> Iterator[None]:
        """Within, new memory gets this label."""
        before, self.label = self.label, label
        try:
            yield
        finally:
            self.label = before

    @contextmanager
    def holding(self, sizes: Mapping[str, float]) -> Iterator[None]:
        """Within, the device holds these bytes in addition, by label."""
        for label, size in sizes.items():
            self.memory.add(label, size)
        try:
            yield
        finally:
            for label, size in sizes.items():
                self.memory.add(label, -size)

    def relabel(self, label: str, tensors: Iterable[Tensor | None]) -> None:
        """Let the memory of these tensors have this label; memory that was made outside of the mode is added."""
        for tensor in tensors:
            if tensor is not None:
                self._see(tensor, label, again=True)

    def take(self) -> Work:
        """Return the work since the last call."""
        work, self.work = self.work, Work()
        return work

    def __torch_dispatch__(
        self,
        func: Callable[..., object],
        types: Iterable[type],
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        out = func(*args, **(kwargs or {}))
        out_tensors = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        if isinstance(func, OpOverload) and not func.is_view:
            self._count(func, args, kwargs or {}, out, out_tensors)
        for tensor in out_tensors:
            self._see(tensor, self._label_of(tensor))
        return out

    def _label_of(self, tensor: Tensor) -> str:
        # The buffer of the head's chunks may have a gap after each row.
        wide = tensor.ndim == 2 and self._vocabulary <= tensor.shape[1] < self._vocabulary + 32
        return "logits" if wide and tensor.is_floating_point() else self.label

    def _see(self, tensor: Tensor, label: str, *, again: bool = False) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        block = self._blocks.get(key)
        if block is None:
            watch = weakref.ref(storage, lambda _: self._free(key))
            self._blocks[key] = _Block(storage.nbytes(), label, watch)
            self.memory.add(label, storage.nbytes())
        elif again and block.label != label:
            self.memory.add(block.label, -block.size)
            self.memory.add(label, block.size)
            block.label = label

    def _free(self, key: int) -> None:
        block = self._blocks.pop(key)
        self.memory.add(block.label, -block.size)

    def _count(
        self,
        func: OpOverload,
        args: tuple[object, ...],
        kwargs: Mapping[str, object],
        out: object,
        out_tensors: list[Tensor],
    ) -> None:
        space, _, name = func._schema.name.partition("::")
        if space not in ("aten", "mkldnn") or name.startswith(WITHOUT_KERNEL):
            return
        formula = OPERATIONS.get(func._overloadpacket)
        operations = 0 if formula is None else formula(*args, **kwargs, out_val=out)
        read = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        touched = [*out_tensors, *(out_tensors if name in READ_IN_PART else read)]
        moved = sum(tensor.numel() * tensor.itemsize for tensor in touched)
        half = any(tensor.dtype in (torch.bfloat16, torch.float16) for tensor in read)
        rate = 1e12 * (self._gpu.bfloat16 if half else self._gpu.float32)
        seconds = max(operations / rate, moved / (1e9 * self._gpu.bandwidth))
        copied = sum(tensor.nbytes for tensor in read if self._on_host(tensor))  # from the host or to it
        self.work += Work(operations, 1, max(seconds, copied / (1e9 * self._gpu.host_bandwidth)))

    def _on_host(self, tensor: Tensor) -> bool:
        block = self._blocks.get(tensor.untyped_storage()._cdata)
        return block is not None and block.label == HOST
