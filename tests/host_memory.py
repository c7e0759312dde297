"""Memory of the host, for models on a CPU: ``model.gradient_checkpointing=offload`` copies as on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import ref

import pytest
import torch
from torch import Tensor

from halos.policy import checkpointing


@contextmanager
def copies() -> Iterator[list[ref[Tensor]]]:
    """Within, inputs of layers are copied. Yields the copies, as weak references."""
    found: list[ref[Tensor]] = []

    def unpinned_like(tensor: Tensor) -> Tensor:
        made = torch.empty_like(tensor)
        found.append(ref(made))
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpointing, "device_type", lambda _: "cuda")
        patch.setattr(checkpointing, "pinned_like", unpinned_like)
        yield found


def offloaded(function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """What the function returns within :func:`copies`; its option ``checkpointing`` says whether there are any."""
    with copies() as copied:
        found = function(*args, **options)
    assert bool(copied) == (options.get("checkpointing") == "offload")
    return found
