"""Counts the least memory of one of our runs: weights, gradients, moments, and what is kept for the backward pass."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback
from omegaconf import OmegaConf
from torch import Tensor

from benchmarks.job import Job, config
from halos.commands.assembly import assemble

NUMBER = 4
"""Bytes of one number of the weights, the gradients and each of AdamW's two moments."""


class Saved(Callback):
    """Counts the bytes that each forward pass keeps for the backward pass, each block of memory once."""

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self._own = {parameter.untyped_storage().data_ptr() for parameter in parameters}
        self._blocks: dict[int, int] = {}
        self.most = self.steps = 0

    def _see(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._own:
            self._blocks[storage.data_ptr()] = storage.nbytes()
        return tensor

    def on_train_batch_start(self, *_: Any) -> None:
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._see, lambda tensor: tensor)
        self._hooks.__enter__()

    def on_before_backward(self, *_: Any) -> None:
        self._hooks.__exit__()
        self.most = max(self.most, sum(self._blocks.values()))
        self._blocks.clear()
        self.steps += 1


class _OfPolicy(Callback):
    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.saved = Saved(pl_module.parameters())
        trainer.callbacks.append(self.saved)


def saved(job: Job, folder: Path) -> dict[str, Any]:
    """MiB of weights, gradients and moments, and of what the largest step keeps for its backward pass.

    In the first step, activations are freed before the moments are allocated. So a run of one step is counted without
    moments.
    """
    run = assemble(config(job, folder))
    run.folder.open(OmegaConf.to_yaml(run.cfg, resolve=True), fresh=True)
    counter = _OfPolicy()
    trainer: Any = run.trainer
    trainer.callbacks.append(counter)
    trainer.fit(run.objective, datamodule=run.data)
    state = 4 if counter.saved.steps > 1 else 2
    parameters = sum(p.numel() for p in run.objective.parameters())
    return {"state_mb": state * NUMBER * parameters / 2**20, "saved_mb": counter.saved.most / 2**20}
