"""GPUs are found by the names that drivers give them."""

from __future__ import annotations

import pytest

from halos.training.gpus import gpu_named


@pytest.mark.parametrize(
    ("device", "bfloat16"),
    [
        ("NVIDIA H200", 989),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A10G", 125),
        ("NVIDIA L40S", 362),
        ("NVIDIA GeForce RTX 4090", 165),
    ],
)
def test_the_longest_name_is_meant(device: str, bfloat16: float) -> None:
    gpu = gpu_named(device)
    assert gpu is not None
    assert gpu.bfloat16 == bfloat16


def test_others_are_unknown() -> None:
    assert gpu_named("NVIDIA Tesla K80") is None
