"""Memory and peak rates of GPUs."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class GPU:
    """Memory in GiB, and peak rates in 10¹² operations per second: in bfloat16 (dense, tensor cores) and in float32."""

    gib: int
    bfloat16: float
    float32: float


GPUS = {
    "a10": GPU(24, 125, 31.2),
    "a100-40gb": GPU(40, 312, 19.5),
    "a100-80gb": GPU(80, 312, 19.5),
    "h100": GPU(80, 989, 67),
    "h200": GPU(141, 989, 67),
    "l40s": GPU(48, 362, 91.6),
    "rtx4090": GPU(24, 165, 82.6),
}
"""As in NVIDIA's data sheets (from memory)."""


def gpu_named(device: str) -> GPU | None:
    """Return the GPU that a driver's name stands for, such as ``NVIDIA H100 80GB HBM3``; None if it is not listed."""
    models = {name.partition("-")[0].removeprefix("rtx").upper(): gpu for name, gpu in GPUS.items()}
    # The longest: an A100's name has that of the A10 in it.
    found = max((model for model in models if model in device), key=len, default=None)
    return None if found is None else models[found]
