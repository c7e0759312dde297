"""What the step of :mod:`halos.estimation.step` really takes on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch.profiler import profile
from torch.utils.flop_counter import FlopCounterMode

from halos.estimation.step import Plan, batch_for, stand_in_trainer
from halos.estimation.tracer import OTHER_OPERATIONS
from halos.objectives.base import Objective
from halos.policy.loading import LoadOptions
from halos.policy.pretrained import load_backbone


def measured(plan: Plan, prompt: int, completion: int) -> tuple[float, float]:
    """Bytes at the peak of an optimizer step, and the operations of a micro-batch.

    Bytes are those of PyTorch's allocator, by its events. The model has random weights. The second step is measured,
    when the optimizer has its state.
    """
    reference = plan.objective(None).needs.reference
    backbone = load_backbone(plan.spec, LoadOptions(dtype=plan.stored, quiet=True), reference=reference)
    objective = plan.objective(backbone)
    objective.configure_model()
    objective.see_labels(1, 1)
    objective.train()
    stand_in_trainer(objective, accumulate=plan.batching.accumulate)
    batch = batch_for(plan, objective, prompt, completion)
    trained = [p for p in objective.parameters() if p.requires_grad]
    optimizer, _ = plan.optim.build(trained, 3)

    def micro_batch() -> None:
        objective.on_train_batch_start(batch, 0)
        mixed = plan.precision == "bf16-mixed"
        with torch.autocast("cpu", torch.bfloat16) if mixed else nullcontext():
            loss = objective.training_step(batch, 0)
        loss.backward()

    def step() -> None:
        for _ in range(min(2, plan.batching.accumulate)):
            micro_batch()
        objective.on_before_optimizer_step(optimizer)
        objective.configure_gradient_clipping(optimizer, plan.clip, "norm")
        optimizer.step()
        optimizer.zero_grad()

    step()
    held = _held(objective, optimizer)
    with profile(profile_memory=True) as profiler:
        step()
    # The formulas take tensors; PyTorch would pass shapes to those that it does not have itself.
    others = {kernel: _Raw(formula) for kernel, formula in OTHER_OPERATIONS.items()}
    with FlopCounterMode(display=False, custom_mapping=others) as counter:
        micro_batch()
    return held + allocated(profiler), counter.get_total_flops()


def allocated(profiler: profile) -> int:
    """The largest sum of what was allocated and not freed since the profiler started, in bytes."""
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()  # type: ignore[attr-defined]  # left out in PyTorch's stubs
        most = max(most, now)
    return most


class _Raw:
    _get_raw = True

    def __init__(self, formula: Callable[..., int]) -> None:
        self.formula = formula

    def __call__(self, *args: Any, **kwargs: Any) -> int:
        return self.formula(*args, **kwargs)


def _held(objective: Objective, optimizer: torch.optim.Optimizer) -> int:
    models = [member.policy for member in objective.trained.with_reference_backbone()]
    tensors = [t for m in (objective, *models) for t in (*m.parameters(), *m.buffers())]
    tensors += [t for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())
