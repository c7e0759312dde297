"""Counts the kernels and collectives of a computation, and the values that the host would wait for.

It works on a CPU, where nothing waits: PyTorch marks the operations whose result is a number for the host or has a
shape that depends on values, and on a GPU the host waits for each of them. It also waits for copies of Python's numbers
to the device (:func:`halos.transfer.on_device` does not).
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.distributed.tensor import DTensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

READS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
"""PyTorch's marks of operations whose result the host has to read."""
INDEXING = ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_")
"""They wait only where an index is a mask: its number of ones has to be read."""
CALLS = ("tolist", "numpy", "__array__", "cpu", "tensor", "as_tensor", "asarray", "new_tensor", "from_numpy")
"""Python functions that read values without an operation that could be seen on a CPU, or that copy them to a device."""
WITHOUT_KERNEL = ("empty", "new_empty", "_unsafe_view", "lift_fresh", "set_", "resize_")
"""Beginnings of the names of operations that have no kernel although they are not views."""
ON_HOST = ("halos/data/", "halos/transfer.py", "torch/utils/data/", "lightning/pytorch/utilities/")
"""Code whose tensors are in the host's memory on every machine."""

TORCH = f"{Path(torch.__file__).parent}/"


@dataclass
class DeviceWork:
    """Counts of a computation.

    Attributes:
        kernels: how often each operation that a device computes (not a view) was called. A few of PyTorch's operations
            launch several kernels, and a compiler may join several operations into one.
        collectives: how often each collective was called.
        waits: each operation for which the host would wait, and the line that called it.
    """

    kernels: Counter[str] = field(default_factory=Counter)
    collectives: Counter[str] = field(default_factory=Counter)
    waits: list[str] = field(default_factory=list)

    def take(self) -> DeviceWork:
        """Return the counts since the last call, and reset them."""
        work = DeviceWork(self.kernels.copy(), self.collectives.copy(), self.waits.copy())
        self.kernels.clear()
        self.collectives.clear()
        self.waits.clear()
        return work

    def note_wait(self, what: str) -> None:
        """Add a wait, unless it is for tensors in the host's memory."""
        callers = list(_callers())
        if not any(part in file for file, _ in callers for part in ON_HOST):
            file, line = callers[0]
            self.waits.append(f"{what} at {'/'.join(Path(file).parts[-3:])}:{line}")


@contextmanager
def watched() -> Iterator[DeviceWork]:
    """Within this context, all work of this thread is counted, including backward passes on a CPU."""
    work = DeviceWork()
    with _Calls(work), _Operations(work):
        yield work


class _Operations(TorchDispatchMode):
    def __init__(self, work: DeviceWork) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.work = work

    def __torch_dispatch__(
        self,
        func: Callable[..., object],
        types: Iterable[type],
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # its own code calls operations on this rank's parts, which are seen here
        if isinstance(func, OpOverload):
            self._count(func, args)
        return func(*args, **(kwargs or {}))

    def _count(self, func: OpOverload, args: tuple[object, ...]) -> None:
        space, _, name = func._schema.name.partition("::")
        if space == "c10d":
            self.work.collectives[name] += 1
        elif space in ("aten", "fsdp") and not func.is_view and not name.startswith(WITHOUT_KERNEL):
            self.work.kernels[name] += 1
        if _reads(func, args):
            self.work.note_wait(name)


def _reads(func: OpOverload, args: tuple[Any, ...]) -> bool:
    if func._schema.name in INDEXING:
        return any(isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    return bool(READS & set(func.tags))


class _Calls(TorchFunctionMode):
    def __init__(self, work: DeviceWork) -> None:
        super().__init__()
        self.work = work

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: Iterable[type],
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        name = getattr(func, "__name__", "")
        if name in CALLS and not (name == "as_tensor" and isinstance(args[0], Tensor)):
            self.work.note_wait(name)
        return func(*args, **(kwargs or {}))


def _callers() -> Iterator[tuple[str, int]]:
    """File and line of each function that is running, from the innermost on, without PyTorch's and this module's."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        file = frame.f_code.co_filename
        if (file != __file__ and not file.startswith(TORCH)) or "/torch/utils/data/" in file:
            yield file, frame.f_lineno
        frame = frame.f_back
