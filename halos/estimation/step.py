"""One optimizer step of a run, on tensors without values."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace

import torch
from torch import nn

from halos.data.batches.batch import Batch
from halos.data.batches.collate import collate
from halos.estimation.division import WHOLE_GRADIENTS, Division, extra
from halos.estimation.functions import DeviceFunctions, as_on
from halos.estimation.head import rows_on
from halos.estimation.rows import rows
from halos.estimation.tracer import Tracer, Work
from halos.objectives.base import Objective
from halos.optim import Optim
from halos.policy.backbone import Backbone
from halos.policy.kernels.layers import repeated_layers
from halos.policy.loading import LoadOptions, ModelSpec
from halos.policy.logprobs.head import assume_logit_shape
from halos.policy.logprobs.packed import assume_packing
from halos.training.gpus import GPU


@dataclass(frozen=True, slots=True, kw_only=True)
class Batching:
    """The micro-batches of one device.

    Attributes:
        examples: in a micro-batch.
        packing, share_prompts, max_tokens: see :func:`halos.data.batches.collate.collate`.
        accumulate: micro-batches of an optimizer step.
    """

    examples: int
    packing: bool = True
    share_prompts: bool = True
    max_tokens: int | None = None
    accumulate: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A run, as far as its step depends on it.

    Attributes:
        spec: the model; its reference is resolved.
        objective: makes the objective of a backbone; of None, one that is only asked for its needs.
        optim: the optimizer.
        precision: as in the configuration.
        device: ``cuda`` or ``cpu``.
        gpu: whose rates count.
        batching: the micro-batches.
        clip: the largest norm of a gradient; None: it is not clipped.
        division: how the model is divided.
        optimizer_share: the part of the traced optimizer's state that the run's optimizer has.
    """

    spec: ModelSpec
    objective: Callable[[Backbone | None], Objective]
    optim: Optim
    precision: str
    device: str
    gpu: GPU
    batching: Batching
    clip: float | None = None
    division: Division = field(default_factory=Division)
    optimizer_share: float = 1.0

    @property
    def stored(self) -> torch.dtype:
        """The precision of the weights that the optimizer changes."""
        return torch.bfloat16 if self.precision == "bf16-true" else torch.float32


@dataclass(frozen=True, slots=True)
class Traced:
    """What a step needs on one device.

    Attributes:
        memory: bytes at its fullest moment, by label.
        host_memory: the most bytes of the host's memory in which activations wait for the backward pass.
        micro_batch: the work of a micro-batch, forward and backward.
        update: the work between the last backward pass and the next step: clipping and the optimizer.
        reference: the work of the reference's forward pass before training; none if it is computed in each step.
    """

    memory: dict[str, float]
    host_memory: float
    micro_batch: Work
    update: Work
    reference: Work

    def step(self, accumulate: int) -> Work:
        """Return the work of an optimizer step."""
        return self.micro_batch * accumulate + self.update


def backbone_for(plan: Plan) -> Backbone:
    """Build the models on the meta device: no trial needs their values."""
    spec, needed = plan.spec, plan.objective(None).needs.reference
    with torch.device("meta"):
        policy = spec.skeleton(LoadOptions(dtype=plan.stored, quiet=True))
    nn.Module.to(policy, "meta")  # adapters are on the CPU; the model's own to() has no types
    backbone = Backbone(
        policy,
        with_reference=needed and spec.reference == "live",
        adapter_reference=needed and spec.reference == "adapter",
        head_chunk=spec.head_chunk if plan.device == "cpu" else rows_on(plan, policy),
        statistics=spec.statistics,
        router_loss=spec.router_loss,
    )
    for member in backbone.with_reference_backbone():
        assume_packing(member.policy)
        assume_logit_shape(member.policy)
        if plan.division.compute_dtype is not None:  # FSDP2 casts the weights that it gathers
            for parameter in member.policy.parameters():
                parameter.data = parameter.data.to(plan.division.compute_dtype)
    return backbone


def trace(plan: Plan, prompt: int, completion: int) -> Traced:
    """Trace an optimizer step on examples of these lengths.

    Args:
        plan: the run.
        prompt: tokens of a prompt.
        completion: tokens of a completion.
    """
    backbone = backbone_for(plan)
    objective = plan.objective(backbone)
    objective.configure_model()
    objective.see_labels(1, 1)
    objective.to("meta").train()
    batch = batch_for(plan, objective, prompt, completion).to("meta")
    shares = plan.division.shares(plan.stored, plan.division.compute_dtype or plan.stored)
    shares["optimizer"] = shares.get("optimizer", 1.0) * plan.optimizer_share
    tracer = Tracer(shares, plan.gpu, backbone.policy.get_output_embeddings().weight.shape[0])
    with as_on(plan.device, tracer.relabel, tracer.labelled) as functions, tracer:
        return _Step(plan, objective, backbone, tracer, functions).run(batch)


def batch_for(plan: Plan, objective: Objective, prompt: int, completion: int) -> Batch:
    """Return a micro-batch of examples of these lengths."""
    needs, batching = objective.data_needs(), plan.batching
    batch = collate(
        rows(needs, batching.examples, prompt, completion),
        mismatched=needs.flags.mismatched,
        last_hidden=needs.flags.last_hidden,
        packing=batching.packing,
        share_prompts=batching.share_prompts,
        max_tokens=batching.max_tokens,
    )
    if objective.needs.reference and plan.spec.reference == "cached":
        batch.reference_bits = torch.zeros(batch.mask.shape).view(torch.int32)
    return batch


def stand_in_trainer(objective: Objective, *, accumulate: int = 1) -> None:
    """Attach what the steps of an objective ask of a Trainer, so that they can be called without one."""
    objective._trainer = SimpleNamespace(  # type: ignore[assignment]
        accumulate_grad_batches=accumulate,
        fit_loop=SimpleNamespace(total_batch_idx=0),
        global_rank=0,
        global_step=0,
        log_every_n_steps=10,
        loggers=[],
        world_size=1,
    )


class _Step:
    def __init__(
        self, plan: Plan, objective: Objective, backbone: Backbone, tracer: Tracer, functions: DeviceFunctions
    ) -> None:
        self.plan, self.objective, self.backbone = plan, objective, backbone
        self.tracer, self.functions = tracer, functions
        self.trained = [p for p in objective.parameters() if p.requires_grad]
        self.extra = extra(plan.division, backbone)

    def run(self, batch: Batch) -> Traced:
        tracer, plan = self.tracer, self.plan
        tracer.relabel("weights", [*self.objective.parameters(), *self.objective.buffers()])
        if self.backbone.reference is not None:
            tracer.relabel("reference", [*self.backbone.reference.parameters(), *self.backbone.reference.buffers()])
        stand_in_trainer(self.objective, accumulate=plan.batching.accumulate)
        reference = self._reference_pass(batch)
        optimizer = self._optimizer()
        tracer.memory.begin()
        with self._gradients_labelled(), tracer.holding(self.extra.always):
            # The second micro-batch meets the gradients of the first; later ones are like it.
            for _ in range(min(2, plan.batching.accumulate)):
                tracer.take()
                self._micro_batch(batch)
            micro_batch = tracer.take()
            tracer.relabel("gradients", [p.grad for p in self.trained])
        with tracer.labelled("update"):
            self.objective.on_before_optimizer_step(optimizer)
            self.objective.configure_gradient_clipping(optimizer, plan.clip, "norm")
            optimizer.step()
        update, share = tracer.take(), 1 / plan.division.shards
        update = Work(update.operations * share, update.kernels, update.seconds * share)
        return Traced(tracer.memory.peak, tracer.memory.host_peak, micro_batch, update, reference)

    def _reference_pass(self, batch: Batch) -> Work:
        if not self.objective.needs.reference or self.plan.spec.reference != "cached":
            return Work()
        with torch.no_grad(), self._computing():
            self.backbone.logprobs(batch)
        return self.tracer.take()

    def _optimizer(self) -> torch.optim.Optimizer:
        """Make the optimizer with its state, which it has from its second step on."""
        optimizer, _ = self.plan.optim.build(self.trained, 3, fused=self.plan.precision != "16-mixed")
        for parameter in self.trained:
            parameter.grad = torch.empty_like(parameter)
        with self.tracer.labelled("optimizer"):
            optimizer.step()
        optimizer.zero_grad()
        self.tracer.take()
        return optimizer

    def _micro_batch(self, batch: Batch) -> None:
        # What Lightning calls.
        self.objective.on_train_batch_start(batch, 0)
        with self._computing():
            loss = self.objective.training_step(batch, 0)
        again = self._computing(keep=False)  # for checkpointed layers
        with self.tracer.labelled("backward"), self.tracer.holding(self.extra.backward), again:
            self.functions.backward(loss)
        with self.tracer.holding(self.extra.end):
            pass  # for a moment

    def _computing(self, *, keep: bool = True) -> AbstractContextManager[None]:
        # The precision in which Lightning runs forward passes. FSDP2 casts weights instead.
        dtype = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(self.plan.precision)
        return self.functions.autocast(None if self.plan.division.compute_dtype else dtype, keep=keep)

    @contextmanager
    def _gradients_labelled(self) -> Iterator[None]:
        layers = {id(p) for layer in repeated_layers(self.backbone.policy) for p in layer.parameters()}

        def label(parameter: nn.Parameter) -> None:
            is_undivided = self.plan.division.keeps_whole(parameter, layers)
            self.tracer.relabel(WHOLE_GRADIENTS if is_undivided else "gradients", [parameter.grad])

        hooks = [p.register_post_accumulate_grad_hook(label) for p in self.trained]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
