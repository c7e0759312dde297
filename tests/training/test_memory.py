"""Freed memory stays with the process on CPUs."""

from __future__ import annotations

import platform
import resource
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from halos.training import memory
from tests.fork import run_ranks


def faults(keep: bool) -> int:
    """Pages that the system has to provide for a tensor of 48 MB, the median of five that come and go.

    Each is a little smaller than the one before: aligned memory is cut out of a larger piece, whose remaining bytes can
    go to a small allocation, and then another tensor of the same size does not fit where the last one was.
    """
    if keep:
        assert memory.keep_freed_memory()
    before, found = torch.ones(12_000_000), []
    for size in range(12_000_000, 11_940_000, -10_000):
        start = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        made = before[:size] * 2
        del made
        found.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - start)
    return sorted(found[1:])[2]


@pytest.mark.ranks
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_memory_that_was_freed_is_used_again() -> None:
    [kept], [returned] = (run_ranks(partial(faults, keep), 1) for keep in (True, False))
    assert kept < 10  # a tensor has 12,000 pages, or 23 large ones
    assert kept < returned / 2


@pytest.mark.parametrize(("device", "calls"), [("cpu", 1), ("cuda", 0)])
def test_only_on_cpus(device: str, calls: int, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[int] = []
    monkeypatch.setattr(memory, "keep_freed_memory", lambda: called.append(1))
    trainer: Any = SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device(device)))
    memory.KeepFreedMemory().setup(trainer, None, "fit")
    assert len(called) == calls


def test_other_systems_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("halos.training.memory.sys.platform", "darwin")
    assert not memory.keep_freed_memory()
    monkeypatch.setattr("halos.training.memory.sys.platform", "linux")
    monkeypatch.setattr("halos.training.memory.ctypes.CDLL", lambda _: SimpleNamespace())  # no mallopt, as with musl
    assert not memory.keep_freed_memory()
