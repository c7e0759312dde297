"""Memory and peak rates of GPUs."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class GPU:
    """Memory and peak rates of a GPU.

    Attributes:
        gib: memory in GiB.
        bfloat16: 10¹² operations per second in bfloat16 (tensor cores, dense).
        float32: the same in float32.
        bandwidth: 10⁹ bytes per second between the memory and the cores.
        host_bandwidth: 10⁹ bytes per second between the GPU's memory and the host's, in one direction.
    """

    gib: int
    bfloat16: float
    float32: float
    bandwidth: float
    host_bandwidth: float


GPUS = {
    "a10": GPU(24, 125, 31.2, 600, 32),
    "a100-40gb": GPU(40, 312, 19.5, 1555, 32),
    "a100-80gb": GPU(80, 312, 19.5, 2039, 32),
    "h100": GPU(80, 989, 67, 3350, 64),
    "h200": GPU(141, 989, 67, 4800, 64),
    "l40s": GPU(48, 362, 91.6, 864, 32),
    "rtx4090": GPU(24, 165, 82.6, 1008, 32),
}
"""Values of NVIDIA's data sheets, for SXM if there are several versions.

All were checked against pages that cite them, except the A10's rate in bfloat16. Hosts are connected by 16 lanes of
PCIe, of the fourth or (H100, H200) fifth generation.
"""


def gpu_named(device: str) -> GPU | None:
    """Return the GPU that a driver's name stands for, such as ``NVIDIA H100 80GB HBM3``; None if it is not listed."""
    models = {name.partition("-")[0].removeprefix("rtx").upper(): gpu for name, gpu in GPUS.items()}
    # The longest match, because the name of an A100 contains that of an A10.
    model_name = max((model for model in models if model in device), key=len, default=None)
    return None if model_name is None else models[model_name]
