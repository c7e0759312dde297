"""``model.head_chunk=auto``: a fixed number of rows on CPUs, on CUDA one that the free memory allows."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from halos.data.batches.collate import collate
from halos.policy.backbone import Backbone
from halos.policy.kernels.device_types import traced_as
from halos.policy.logprobs import head, head_rows
from halos.policy.logprobs.head_rows import check_head_chunk, chunk_rows, rows_that_fit
from tests import tiny

GIB = 2**30


@pytest.mark.parametrize(
    ("free", "vocabulary", "itemsize", "rows"),
    [
        (8 * GIB, 2**17, 2, 1024),  # a 32nd part is 256 MiB, a row 256 KiB
        (8 * GIB, 2**17, 4, 512),
        (8 * GIB - 1, 2**17, 2, 512),  # a byte less, and the next power of two
        (15 * GIB, 2**17, 2, 1024),
        (140 * GIB, 2**15, 2, 4096),  # more would save next to nothing
        (GIB // 8, 2**17, 2, 128),
        (0, 2**17, 2, 128),
    ],
)
def test_a_chunk_takes_a_small_part_of_the_free_memory(free: int, vocabulary: int, itemsize: int, rows: int) -> None:
    assert rows_that_fit(free, vocabulary, itemsize) == rows
    assert rows == 128 or rows * vocabulary * itemsize <= free / 32


def cuda_states(dtype: torch.dtype) -> Any:
    return SimpleNamespace(device=torch.device("cuda", 0), is_cuda=True, dtype=dtype)


def test_the_memory_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    reads = []

    def free(device: torch.device) -> tuple[int, int]:
        reads.append(device)
        return 7 * GIB // len(reads), 80 * GIB

    monkeypatch.setattr(torch.cuda, "mem_get_info", free)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 3 * GIB)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 2 * GIB)
    monkeypatch.setattr(torch.amp, "is_autocast_available", lambda device: False)
    head_rows.free_memory.cache_clear()
    try:
        # 7 GiB that the driver has, and one that PyTorch keeps unused.
        rows = [chunk_rows("auto", cuda_states(dtype), 2**17) for dtype in (torch.bfloat16, torch.float32)]
        assert rows == [1024, 512]
        assert reads == [torch.device("cuda", 0)]
    finally:
        head_rows.free_memory.cache_clear()


def test_other_devices_and_numbers_that_were_set_read_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", None)
    states = torch.ones(3, 2)
    assert chunk_rows("auto", states, 2**17) == 512
    with traced_as("cuda"):
        assert chunk_rows("auto", states.to("meta"), 2**17) == 512
    assert [chunk_rows(rows, cuda_states(torch.bfloat16), 2**17) for rows in (None, 7)] == [None, 7]


def test_on_a_cpu_auto_gives_the_numbers_of_512(monkeypatch: pytest.MonkeyPatch) -> None:
    batch, model = collate(tiny.rows(4, branches=2), packing=True), tiny.model()
    chunks = []
    whole = head.chunked_logprobs  # type: ignore[attr-defined]

    def noted(*args: Any, rows: int, **options: Any) -> Any:
        chunks.append(rows)
        return whole(*args, rows=rows, **options)

    monkeypatch.setattr(head, "chunked_logprobs", noted)
    auto, fixed = (Backbone(model, with_reference=False, head_chunk=rows).logprobs(batch) for rows in ("auto", 512))
    assert chunks == [512, 512]
    assert torch.equal(auto.tokens, fixed.tokens)


@pytest.mark.parametrize("rows", ["all", 0, 1.0, True])
def test_what_is_no_number_of_rows_is_refused(rows: object) -> None:
    with pytest.raises(ValueError, match=r"^model\.head_chunk: expected a whole number from 1 on, auto or null, found"):
        check_head_chunk(rows)
    for good in ("auto", None, 1):
        check_head_chunk(good)
