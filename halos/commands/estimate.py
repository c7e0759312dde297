"""``estimate(cfg)``: memory and time of a run on given devices, before any of them is booked."""

from __future__ import annotations

from typing import Any

import torch
from omegaconf import DictConfig
from rich.table import Table

from halos import terminal
from halos.commands.assembly import objective_maker
from halos.config.building import build
from halos.objectives.base import Objective
from halos.optim import AdamW, BitsAndBytesAdamW, Optim, RMSprop
from halos.policy.loading import ModelSpec
from halos.training.cost import GIB, Example, Setting, Shape, memory, operations

BRANCHES = {"pairs": 2, "binary": 1, "demonstrations": 1, "scored": 1}

GPUS = {
    "a10": (24, 125, 31.2),
    "a100-40gb": (40, 312, 19.5),
    "a100-80gb": (80, 312, 19.5),
    "h100": (80, 989, 67),
    "h200": (141, 989, 67),
    "l40s": (48, 362, 91.6),
    "rtx4090": (24, 165, 82.6),
}
"""GiB of memory, and 10¹² operations per second in bfloat16 (dense, tensor cores) and in float32, as NVIDIA's data
sheets have them (from memory)."""


def estimate(cfg: DictConfig) -> dict[str, Any]:
    """Print and return {"memory": bytes by part, "total", "fits", "operations", "hours"} of the run that ``cfg`` is.

    Hours are None where the number of examples is not known. Raises ``ValueError`` for an unknown GPU, a model that
    cannot be looked at, and settings that no formula stands for.
    """
    terminal.set_up_logging()
    asked = cfg.estimate
    if asked.gpu not in GPUS:
        raise ValueError(f"estimate.gpu: expected one of {', '.join(GPUS)}; found {asked.gpu!r}")
    if not 0 < asked.utilisation <= 1:
        raise ValueError(f"estimate.utilisation: expected a share above 0 and up to 1, found {asked.utilisation!r}")
    spec: ModelSpec = build(cfg.model).resolved(streaming=cfg.data.streaming)
    if cfg.strategy.name not in ("auto", "ddp", "fsdp"):
        raise ValueError(
            f"estimate: expected strategy=auto, ddp or fsdp, found {cfg.strategy.name}, which is not estimated"
        )
    if spec.lora.enabled:
        raise ValueError("estimate: expected model.lora.enabled=false, as adapters are not estimated")
    objective = _objective(cfg)
    shape = _shape(spec)
    gib, half, single = GPUS[asked.gpu]
    devices = _devices(cfg)
    example = _example(cfg, objective, cfg.estimate.prompt_tokens, cfg.estimate.completion_tokens)
    longest = _example(cfg, objective, None, None)
    live = spec.reference == "live" and objective.needs.reference
    setting = Setting(
        precision=cfg.precision,
        cpu=cfg.trainer.accelerator == "cpu" and spec.cpu_kernels,
        divided=devices // int(cfg.strategy.trainer.replicas) if cfg.strategy.name == "fsdp" else 1,
        state=_state_bytes(build(cfg.optim), 2 if cfg.precision == "bf16-true" else 4),
        live_reference=live,
        checkpointing=spec.gradient_checkpointing,
        head_chunk=spec.head_chunk,
    )
    parts = memory(shape, setting, tokens=cfg.data.batch_size * longest.trained)
    total = sum(parts.values())
    examples, epochs = _examples(cfg, devices)
    each = operations(
        shape,
        example,
        reference=objective.needs.reference,
        live=live,
        checkpointing=spec.gradient_checkpointing,
        epochs=epochs,
    )
    rate = devices * asked.utilisation * 1e12 * (single if cfg.precision == "32-true" else half)
    hours = None if examples is None else examples * each / rate / 3600
    found = {"memory": parts, "total": total, "fits": total < gib * GIB, "operations": each, "hours": hours}
    _show(cfg, shape, found, devices)
    return found


def _objective(cfg: DictConfig) -> Objective:
    # Made without a backbone: whether y' and a reference are needed may depend on its parameters.
    return objective_maker(cfg.loss)(None)


def _shape(spec: ModelSpec) -> Shape:
    # The model's config is enough: neither weights nor a tokenizer need be there.
    with torch.device("meta"):
        return Shape.of(spec.skeleton())


def _devices(cfg: DictConfig) -> int:
    count = cfg.trainer.devices or 1
    if not isinstance(count, int) or count < 1:
        raise ValueError(f"trainer.devices: expected a number for an estimate, found {count!r}")
    return count * int(cfg.trainer.num_nodes)


def _example(cfg: DictConfig, objective: Objective, prompt: int | None, completion: int | None) -> Example:
    # As long as the data's limits allow, where a length is not given.
    most = cfg.data.max_length
    prompt = min(cfg.data.max_prompt_length or most // 2, most) if prompt is None else prompt
    completion = most - prompt if completion is None else completion
    if min(prompt, completion) < 0 or prompt + completion > most:
        raise ValueError(
            f"estimate: expected prompt_tokens and completion_tokens within data.max_length={most}, found {prompt} and "
            f"{completion}"
        )
    shared = cfg.data.packing and cfg.data.share_prompts
    return Example.of(
        prompt, completion, branches=BRANCHES[objective.view], mismatched=objective.needs.mismatched, shared=shared
    )


def _examples(cfg: DictConfig, devices: int) -> tuple[int | None, float]:
    # (different examples, passes over them)
    if cfg.trainer.max_steps > 0:
        step = cfg.data.batch_size * cfg.trainer.accumulate_grad_batches * devices
        return cfg.trainer.max_steps * step, 1.0
    return cfg.estimate.examples, float(cfg.trainer.max_epochs)


def _state_bytes(optim: Optim, weight: int) -> float:
    if isinstance(optim, BitsAndBytesAdamW):
        return 2 * optim.bits / 8
    if isinstance(optim, AdamW):
        return 2.0 * weight
    return float(weight) if isinstance(optim, RMSprop) else 0.0


def _show(cfg: DictConfig, shape: Shape, found: dict[str, Any], devices: int) -> None:
    asked = cfg.estimate
    model = f"{cfg.model.path} ({shape.parameters / 1e9:.2f}·10⁹ weights)"
    terminal.say(
        f"{model}, {cfg.loss.name}, {cfg.precision}, on each of {devices} × {asked.gpu} ({cfg.strategy.name}):"
    )
    table = Table()
    table.add_column("memory")
    table.add_column("GiB", justify="right")
    for name, size in [*found["memory"].items(), ("total", found["total"])]:
        table.add_row(name, f"{size / GIB:.2f}")
    terminal.console.print(table)
    fits = "fits into" if found["fits"] else "does not fit into"
    terminal.say(f"{found['total'] / GIB:.1f} GiB {fits} the {GPUS[asked.gpu][0]} of {asked.gpu}")
    if found["hours"] is None:
        terminal.say("time: set estimate.examples (training examples) or trainer.max_steps")
    else:
        terminal.say(f"time: {found['hours']:.1f} h at {asked.utilisation:.0%} of the peak rate, reference included")
