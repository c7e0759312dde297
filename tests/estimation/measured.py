"""What the step of :mod:`halos.estimation.step` really takes on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from torch.profiler import profile
from torch.utils.flop_counter import FlopCounterMode

from halos.data.batches.collate import collate
from halos.estimation.step import Plan, rows
from halos.estimation.tracer import OTHER_OPERATIONS
from halos.objectives.base import Objective
from halos.policy.loading import LoadOptions
from halos.policy.pretrained import load_backbone


def measured(plan: Plan, prompt: int, completion: int) -> tuple[float, float]:
    """Bytes at the peak of an optimizer step, and the operations of a micro-batch.

    Bytes are those of PyTorch's allocator, by its events. The model has random weights. The second step is measured,
    when the optimizer has its state.
    """
    dtype = torch.bfloat16 if plan.precision == "bf16-true" else torch.float32
    needs = plan.objective(None).needs
    backbone = load_backbone(plan.spec, LoadOptions(dtype=dtype, quiet=True), reference=needs.reference)
    objective = plan.objective(backbone)
    objective.configure_model()
    objective.see_labels(1, 1)
    objective.train()
    objective._trainer = SimpleNamespace(  # type: ignore[assignment]
        accumulate_grad_batches=plan.batching.accumulate,
        fit_loop=SimpleNamespace(total_batch_idx=0),
        global_rank=0,
        global_step=0,
        log_every_n_steps=10,
        loggers=[],
        world_size=1,
    )
    data, batching = objective.data_needs(), plan.batching
    options: dict[str, Any] = {"packing": batching.packing, "share_prompts": batching.share_prompts}
    batch = collate(
        rows(data, batching.examples, prompt, completion),
        mismatched=data.mismatched,
        whole=data.whole_completions,
        max_tokens=batching.max_tokens,
        **options,
    )
    if needs.reference and plan.spec.reference == "cached":
        batch.reference_bits = torch.zeros(batch.mask.shape).view(torch.int32)
    trained = [p for p in objective.parameters() if p.requires_grad]
    optimizer, _ = plan.optim.build(trained, 3)

    def micro_batch() -> None:
        objective.on_train_batch_start(batch, 0)
        mixed = plan.precision == "bf16-mixed"
        with torch.autocast("cpu", torch.bfloat16) if mixed else nullcontext():
            loss = objective.training_step(batch, 0)
        loss.backward()

    def step() -> None:
        for _ in range(min(2, batching.accumulate)):
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
