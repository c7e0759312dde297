"""The precision in which products are computed."""

import torch
from torch import Tensor

from halos.policy.kernels.device_types import device_type


def product_dtype(tensor: Tensor) -> torch.dtype:
    """Return autocast's precision on the tensor's device where autocast is on, else the tensor's own."""
    device = device_type(tensor)
    # The meta device knows no autocast.
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return tensor.dtype
