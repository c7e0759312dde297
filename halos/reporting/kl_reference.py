"""The reference that a run's KL is measured against: a live one, the policy without its adapter, or a loaded model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import lightning.pytorch as pl
import torch

from halos.data.batches.collate import collate
from halos.data.rows.token_rows import Row
from halos.objectives.base import Objective
from halos.policy.adapters import adapter_layers, as_reference
from halos.policy.backbone import Backbone
from halos.policy.loading import ModelSpec
from halos.processes.collectives import all_max, local
from halos.sharding.sharding import unsharded_root

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MARGIN = 1.2
"""The memory that a second model needs for scoring, as a multiple of its weights."""


class NoRoomError(Exception):
    """The reference does not fit into memory in addition to what training uses."""


def missing_reference(spec: ModelSpec, *, live: bool) -> str | None:
    """Return why a run has no reference to measure its KL against; None: it has one.

    Args:
        spec: the model, its ``reference`` resolved.
        live: whether the objective keeps a live reference.
    """
    if spec.random_weights and not (live or spec.lora.enabled or spec.reference_path):
        return "the random weights that training starts from are kept nowhere (model.reference=live keeps them)"
    return None


@contextmanager
def kl_reference(
    trainer: pl.Trainer, objective: Objective
) -> Iterator[tuple[PreTrainedModel, Callable[[], AbstractContextManager[object]]]]:
    """Yield a model, and a function for a context in which it computes as the reference. All ranks enter it together.

    Raises:
        NoRoomError: the reference would have to be loaded, and does not fit into memory.
    """
    backbone = objective.trained
    own_start = backbone.spec is None or backbone.spec.reference_path is None
    if backbone.reference is not None:
        with unsharded_root(backbone.with_reference_backbone()[1]):
            yield backbone.reference, nullcontext
    elif adapter_layers(backbone.policy) and own_start:
        yield backbone.policy, partial(as_reference, backbone.policy)
    else:
        # A resumed run has the weights of its checkpoint, though no optimizer has changed them yet.
        backbone.updated |= trainer.global_step > 0
        _check_room(backbone)
        scorer = objective.source.reference_scorer(backbone, getattr(trainer.strategy, "sharding", None))
        if scorer is not backbone:
            _place(scorer, trainer)
        with unsharded_root(scorer):
            yield scorer.policy, nullcontext


@torch.no_grad()
def _place(scorer: Backbone, trainer: pl.Trainer) -> None:
    if not scorer.sharded:
        trainer.precision_plugin.convert_module(scorer).to(trainer.strategy.root_device)
        return
    # FSDP2 finds out in the first forward which module is the root, so that must not be a layer's.
    scorer.logprobs(collate([Row("first", 0, (0,), ((0,),))]).to(scorer.device))


def _check_room(backbone: Backbone) -> None:
    # All ranks must decide the same, because they load and score the reference together.
    needed = MARGIN * sum(local(p).numel() * p.element_size() for p in backbone.policy.parameters())
    free = _free_bytes(backbone.device)
    lacking = free is not None and free < needed
    if all_max([int(lacking)])[0]:
        mib = f"{needed / 2**20:,.0f} MiB for the reference, found {(free or 0) / 2**20:,.0f}"
        raise NoRoomError(f"model.reference=cached: expected {mib} free on {backbone.device}")


def _free_bytes(device: torch.device) -> float | None:
    if device.type == "cuda":
        # Memory that PyTorch has reserved but does not use counts as free.
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return float(torch.cuda.mem_get_info(device)[0] + unused)
    file = Path("/proc/meminfo")
    if device.type != "cpu" or not file.is_file():
        return None
    lines = (line.split() for line in file.read_text(encoding="ascii").splitlines())
    return next((1024.0 * int(fields[1]) for fields in lines if fields[0] == "MemAvailable:"), None)
