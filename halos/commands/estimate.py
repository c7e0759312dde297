"""``estimate(cfg)``: the memory and time of a run on given devices, before any of them is booked."""

from typing import Any

import torch
from omegaconf import DictConfig
from rich.table import Column, Table

from halos import terminal
from halos.checks import check_choice, check_share
from halos.commands.builders import objective_maker
from halos.config.nodes import build
from halos.objectives.base import Objective
from halos.optim import AdamW, BitsAndBytesAdamW, Optim, RMSprop
from halos.policy.loading import ModelSpec
from halos.training.cost import GIB, Example, Setting, Shape, memory, operations
from halos.training.gpus import GPUS

BRANCHES = {"pairs": 2, "binary": 1, "demonstrations": 1, "scored": 1}
"""Completions of a prompt that an example of a view has."""


def estimate(cfg: DictConfig) -> dict[str, Any]:
    """Print and return what the configured run needs.

    Returns:
        The bytes of a device by part (``memory``), their ``total``, whether it ``fits``, the ``operations`` of an
        example, and the ``hours``; None where the number of examples is not known.

    Raises:
        ValueError: an unknown GPU, a model whose config cannot be read, or settings that no formula covers.
    """
    terminal.set_up_logging()
    # Made without a backbone: whether y' and a reference are needed may depend on its parameters.
    objective = objective_maker(cfg.loss)(None)
    spec: ModelSpec = build(cfg.model)
    spec = spec.resolved(streaming=cfg.data.streaming, divergence=objective.needs.divergence)
    _check(cfg, spec)
    gpu, devices = GPUS[cfg.estimate.gpu], (cfg.trainer.devices or 1) * int(cfg.trainer.num_nodes)
    # The model's config is enough: neither weights nor a tokenizer need be there.
    with torch.device("meta"):
        shape = Shape.of(spec.skeleton())
    setting = _setting(cfg, spec, objective, devices)
    # Memory is computed for the longest examples, time for average ones.
    longest = _example(cfg, objective, None, None)
    average = _example(cfg, objective, cfg.estimate.prompt_tokens, cfg.estimate.completion_tokens)
    parts = memory(shape, setting, tokens=cfg.data.batch_size * longest.trained)
    # With max_steps every example that is read counts as a different one.
    examples, epochs = cfg.estimate.examples, float(cfg.trainer.max_epochs)
    if cfg.trainer.max_steps > 0:
        step = cfg.data.batch_size * cfg.trainer.accumulate_grad_batches * devices
        examples, epochs = cfg.trainer.max_steps * step, 1.0
    per_example = operations(shape, average, setting, reference=objective.needs.reference, epochs=epochs)
    rate = devices * cfg.estimate.utilisation * 1e12 * (gpu.float32 if cfg.precision == "32-true" else gpu.bfloat16)
    hours = None if examples is None else examples * per_example / rate / 3600
    total = sum(parts.values())
    fits = total < gpu.gib * GIB
    _show(cfg, shape, parts, fits=fits, hours=hours, devices=devices)
    return {"memory": parts, "total": total, "fits": fits, "operations": per_example, "hours": hours}


def _check(cfg: DictConfig, spec: ModelSpec) -> None:
    check_choice("estimate.gpu", cfg.estimate.gpu, GPUS)
    check_share("estimate.utilisation", cfg.estimate.utilisation)
    check_choice("strategy of an estimate", cfg.strategy.name, ("auto", "ddp", "fsdp"))
    if spec.lora.enabled:
        raise ValueError("estimate: expected model.lora.enabled=false, found true; adapters are not estimated")
    if cfg.trainer.devices is not None and (type(cfg.trainer.devices) is not int or cfg.trainer.devices < 1):
        raise ValueError(f"trainer.devices: expected a number for an estimate, found {cfg.trainer.devices!r}")


def _setting(cfg: DictConfig, spec: ModelSpec, objective: Objective, devices: int) -> Setting:
    return Setting(
        precision=cfg.precision,
        cpu=cfg.trainer.accelerator == "cpu" and spec.cpu_kernels,
        divided=devices // int(cfg.strategy.trainer.replicas) if cfg.strategy.name == "fsdp" else 1,
        state=_state_bytes(build(cfg.optim), 2 if cfg.precision == "bf16-true" else 4),
        live_reference=spec.reference == "live" and objective.needs.reference,
        checkpointing=spec.gradient_checkpointing,
        head_chunk=spec.head_chunk,
    )


def _example(cfg: DictConfig, objective: Objective, prompt: int | None, completion: int | None) -> Example:
    # Where a length is not set, the example is as long as the data's limits allow.
    limit = cfg.data.max_length
    prompt = min(cfg.data.max_prompt_length or limit // 2, limit) if prompt is None else prompt
    completion = limit - prompt if completion is None else completion
    if min(prompt, completion) < 0 or prompt + completion > limit:
        expected = f"prompt_tokens and completion_tokens within data.max_length={limit}"
        raise ValueError(f"estimate: expected {expected}, found {prompt} and {completion}")
    # A completion that several views of a mixture read is computed once.
    branches = max(BRANCHES[view] for view in objective.view.split("+"))
    mismatched = objective.needs.mismatched
    shared = cfg.data.packing and cfg.data.share_prompts
    return Example.of(prompt, completion, branches=branches, mismatched=mismatched, shared=shared)


def _state_bytes(optim: Optim, weight: int) -> float:
    # First, as it is an AdamW too.
    if isinstance(optim, BitsAndBytesAdamW):
        return 2 * optim.bits / 8
    if isinstance(optim, AdamW):
        return 2.0 * weight
    return float(weight) if isinstance(optim, RMSprop) else 0.0


def _show(
    cfg: DictConfig, shape: Shape, parts: dict[str, float], *, fits: bool, hours: float | None, devices: int
) -> None:
    model = f"{cfg.model.path} ({shape.parameters / 1e9:.2f}·10⁹ weights)"
    place = f"each of {devices} × {cfg.estimate.gpu} ({cfg.strategy.name})"
    terminal.say(f"{model}, {cfg.loss.name}, {cfg.precision}, on {place}:")
    total = sum(parts.values())
    table = Table("memory", Column("GiB", justify="right"))
    for name, size in [*parts.items(), ("total", total)]:
        table.add_row(name, f"{size / GIB:.2f}")
    terminal.console.print(table)
    into = "fits into" if fits else "does not fit into"
    terminal.say(f"{total / GIB:.1f} GiB {into} the {GPUS[cfg.estimate.gpu].gib} of {cfg.estimate.gpu}")
    needed = "set estimate.examples (training examples) or trainer.max_steps"
    if hours is not None:
        needed = f"{hours:.1f} h at {cfg.estimate.utilisation:.0%} of the peak rate, reference included"
    terminal.say(f"time: {needed}")
