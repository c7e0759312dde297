"""A whole optimizer step of every objective on the meta device, where tensors have shapes and no values.

There a tensor on another device raises, and so does every reading of a value (``item``, ``tolist``, ``nonzero``, an
index by a mask, ``if tensor``): what a GPU's host would have to wait for. Trials that read values once for each model
(whether it can read packed rows) are done before, on the CPU. What is read when a step is logged is not part of a step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import cache
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from halos.data.batches.batch import Batch, Chunk
from halos.data.batches.packing import Pack
from halos.estimation.step import stand_in_trainer
from halos.loop.steps import Steps
from halos.objectives import KTO, PPO, SFT, BradleyTerry, Objective
from halos.optim import AdamW
from halos.policy.backbone import Backbone
from halos.policy.logprobs import chunked_head, completions, packed
from halos.policy.lora import LoRA
from tests import architectures, tiny
from tests.loop_runs import OBJECTIVES, REQUIRED, batch_of, described, rows_for

MODELS: dict[str, Callable[[], Any]] = {
    "dense": lambda: tiny.model(num_key_value_heads=2),
    "grouped heads": lambda: tiny.model(num_key_value_heads=1),
    "sliding window": lambda: tiny.model("mistral"),
    "soft cap": lambda: tiny.model("gemma2"),
    "experts": lambda: architectures.model("mixtral", dtype=torch.bfloat16),  # grouped products have no float32 there
}
ROWS, REFERENCES = ("packed", "padded"), ("cached", "live", "adapter")
CASES = [*product(MODELS, ROWS, REFERENCES)]
"""All of them for KTO. Every other loss has one of each model, and all rows and references among them."""


@pytest.fixture(autouse=True)
def _libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    autocast = torch.autocast

    def known_devices(device_type: str, **options: Any) -> Any:
        return nullcontext() if device_type == "meta" else autocast(device_type, **options)

    # peft switches autocast off around adapters on experts. PyTorch has none for the meta device.
    monkeypatch.setattr(torch, "autocast", known_devices)


@cache
def backbone(model: str, reference: str) -> Backbone:
    """On the meta device, its trials done."""
    policy = MODELS[model]()
    if reference == "adapter":
        LoRA(enabled=True, rank=2).attach(policy, base="a/model")
    adapted = reference == "adapter"
    made = Backbone(
        policy, with_reference=reference == "live", adapter_reference=adapted, statistics=("entropy",), head_chunk=4
    )
    for rows in (True, False):
        for member in made.with_reference_backbone():
            member.logprobs(batch_of(KTO, rows_for(KTO, 2), packing=rows))
            # Otherwise the cases with packed rows would be those with padded ones once more.
            assert packed._obstacle(member.policy) is None
            assert packed.can_pack(member.policy)
    return made.to("meta")


def objective_and_batch(kind: Any, model: str, rows: str, reference: str) -> tuple[Objective, Batch]:
    objective: Objective = kind(backbone(model, reference), optim=AdamW(lr=1e-3), **REQUIRED.get(kind, {}))
    objective.configure_model()
    objective.see_labels(4, 3)
    batch = batch_of(kind, rows_for(kind, 6), packing=rows == "packed", chunks=2)
    if objective.needs.reference and reference == "cached":
        batch.reference_bits = torch.zeros(batch.mask.shape).view(torch.int32)
    stand_in_trainer(objective)
    return objective.to("meta").train(), batch.to("meta")


def step(objective: Objective, batch: Batch) -> None:
    """What Lightning calls in an optimizer step that is not logged."""
    optimizer, schedule = objective._optim.build([p for p in objective.parameters() if p.requires_grad], 3, fused=False)
    objective.on_train_batch_start(batch, 0)
    objective.training_step(batch, 0).backward()
    objective.on_before_optimizer_step(optimizer)
    objective.configure_gradient_clipping(optimizer, 1.0, "norm")
    optimizer.step()
    schedule.step()
    optimizer.zero_grad()
    objective.trained.updated = True
    objective.end_step()


QUICK = (KTO, PPO, SFT)


@pytest.mark.parametrize(
    "kind",
    [kind if kind in QUICK else pytest.param(kind, marks=pytest.mark.slow) for kind in OBJECTIVES],
    ids=lambda kind: kind.__name__,
)
def test_a_step_waits_for_no_value_and_stays_on_its_device(kind: type[Objective]) -> None:
    first = OBJECTIVES.index(kind)
    turns = [(model, ROWS[(first + n) % 2], REFERENCES[(first + n) % 3]) for n, model in enumerate(MODELS)]
    cases = CASES if kind is KTO else turns
    for model, rows, reference in cases:
        objective, batch = objective_and_batch(kind, model, rows, reference)
        step(objective, batch)
        assert all(p.device.type == "meta" for p in objective.parameters())
    assert len(cases) == (30 if kind is KTO else 5)
    assert [len({case[n] for case in cases}) for n in range(3)] == [5, 2, 3]


def test_every_objective_is_tried() -> None:
    assert {KTO, PPO, SFT, BradleyTerry} < set(OBJECTIVES)
    assert len({described(kind).view for kind in OBJECTIVES}) == 4


# Each kind of fault, planted


def item(values: Tensor) -> None:
    values.flatten()[0].item()


def tolist(values: Tensor) -> None:
    values.tolist()


def nonzero(values: Tensor) -> None:
    values.nonzero()


def mask_index(values: Tensor) -> None:
    _ = values[values > 0]


def branch(values: Tensor) -> None:
    if values.sum() > 0:
        pass


def numpy(values: Tensor) -> None:
    np.asarray(values)


def other_device(values: Tensor) -> None:
    _ = values + torch.ones(values.shape)


FAULTS = (item, tolist, nonzero, mask_index, branch, numpy, other_device)


def in_loss(fault: Callable[[Tensor], None], patch: pytest.MonkeyPatch) -> None:
    compute = KTO.compute

    def faulty(self: KTO, batch: Batch, policy: Any, reference: Any) -> Any:
        fault(policy.tokens.detach())
        return compute(self, batch, policy, reference)

    patch.setattr(KTO, "compute", faulty)


def in_head(fault: Callable[[Tensor], None], patch: pytest.MonkeyPatch) -> None:
    blocks = chunked_head._blocks

    def faulty(chunk: slice, logits: Tensor) -> Iterator[tuple[slice, Tensor]]:
        fault(logits.detach())
        return blocks(chunk, logits)

    patch.setattr(chunked_head, "_blocks", faulty)


def in_metrics(fault: Callable[[Tensor], None], patch: pytest.MonkeyPatch) -> None:
    add = Steps.add

    def faulty(self: Steps, batch: Batch, metrics: Any, rewards: Any) -> None:
        fault(rewards[0].detach())
        add(self, batch, metrics, rewards)

    patch.setattr(Steps, "add", faulty)


def in_packing(fault: Callable[[Tensor], None], patch: pytest.MonkeyPatch) -> None:
    pack_logprobs = packed.pack_logprobs

    def faulty(model: Any, packs: list[Pack], options: Any) -> Any:
        fault(packs[0].position)
        return pack_logprobs(model, packs, options)

    patch.setattr(completions, "pack_logprobs", faulty)


def in_padding(fault: Callable[[Tensor], None], patch: pytest.MonkeyPatch) -> None:
    chunk_results = completions._chunk_results

    def faulty(model: Any, chunk: Chunk, *args: Any) -> Any:
        fault(chunk.predicts)
        return chunk_results(model, chunk, *args)

    patch.setattr(completions, "_chunk_results", faulty)


@pytest.mark.parametrize("place", [in_loss, in_head, in_metrics, in_packing, in_padding], ids=lambda f: f.__name__)
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_planted_fault_is_caught(fault: Any, place: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    objective, batch = objective_and_batch(KTO, "dense", "padded" if place is in_padding else "packed", "cached")
    step(objective, batch)
    place(fault, monkeypatch)
    with pytest.raises((RuntimeError, NotImplementedError, ValueError, TypeError)):
        step(objective, batch)
