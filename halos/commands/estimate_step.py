"""The memory and time of a run, from one traced optimizer step; :mod:`halos.commands.estimate` checks the settings."""

from dataclasses import replace
from typing import Any

import torch
from omegaconf import DictConfig
from rich.table import Column, Table

from halos import terminal
from halos.checks import check_whole
from halos.commands.builders import objective_maker
from halos.config.nodes import build
from halos.estimation.division import Division
from halos.estimation.step import Batching, Plan, Traced, trace
from halos.estimation.tracer import Work
from halos.optim import AdamW, BitsAndBytesAdamW, Optim
from halos.policy.loading import ModelSpec
from halos.sharding.tensor_parallel import check_divisor
from halos.training.gpus import GPUS

GIB = 2**30
LAUNCH_SECONDS = 1e-5
"""Time that the host needs to start a kernel with PyTorch, an assumption. It decides in steps of many small kernels."""


def estimate_step(cfg: DictConfig) -> dict[str, Any]:
    """Print and return what the configured run needs; see :func:`halos.commands.estimate.estimate`."""
    # Made without a backbone: whether y' and a reference are needed may depend on its parameters.
    objective = objective_maker(cfg.loss)(None)
    spec: ModelSpec = build(cfg.model)
    spec = spec.resolved(streaming=cfg.data.streaming, divergence=objective.needs.divergence)
    plan = _plan(cfg, spec)
    # Memory is computed for the longest examples, time for average ones.
    longest = trace(plan, *_lengths(cfg, None, None))
    lengths = cfg.estimate.prompt_tokens, cfg.estimate.completion_tokens
    average = longest if lengths == (None, None) else trace(plan, *_lengths(cfg, *lengths))
    step = average.step(plan.batching.accumulate)
    total, seconds = sum(longest.memory.values()), _seconds(cfg, step)
    fits = total < plan.gpu.gib * GIB
    hours = _hours(cfg, plan, seconds, _seconds(cfg, average.reference))
    _show(cfg, plan, longest, step, total=total, fits=fits, seconds=seconds, hours=hours)
    work = {"operations": step.operations, "kernels": step.kernels, "step_seconds": seconds}
    memory = {"memory": longest.memory, "total": total, "fits": fits, "host_memory": longest.host_memory}
    return memory | {"hours": hours} | work


def _plan(cfg: DictConfig, spec: ModelSpec) -> Plan:
    optim: Optim = build(cfg.optim)
    share = 1.0
    if isinstance(optim, BitsAndBytesAdamW):
        # Its kernels are on CUDA only. It keeps AdamW's two moments in fewer bits.
        share = optim.bits / 32
        optim = AdamW(lr=optim.lr)
    data = cfg.data
    return Plan(
        spec=replace(spec, compile=False),
        objective=objective_maker(cfg.loss),
        optim=optim,
        precision=cfg.precision,
        device="cpu" if cfg.trainer.accelerator == "cpu" else "cuda",
        gpu=GPUS[cfg.estimate.gpu],
        clip=cfg.trainer.gradient_clip_val,
        division=_division(cfg),
        optimizer_share=share,
        batching=Batching(
            examples=data.batch_size,
            packing=data.packing,
            share_prompts=data.share_prompts,
            max_tokens=data.max_tokens_per_batch,
            accumulate=cfg.trainer.accumulate_grad_batches,
        ),
    )


def _division(cfg: DictConfig) -> Division:
    devices = (cfg.trainer.devices or 1) * int(cfg.trainer.num_nodes)
    if cfg.strategy.name != "fsdp":
        return Division(devices=devices, ddp=cfg.strategy.name == "ddp" and devices > 1)
    options = cfg.strategy.trainer
    check_whole("strategy.trainer.replicas", options.replicas, 1)
    check_divisor("strategy.trainer.replicas", options.replicas, devices, "devices")
    return Division(
        devices=devices,
        shards=devices // int(options.replicas),
        compute_dtype=torch.bfloat16 if cfg.precision == "bf16-mixed" else None,
        reshard=options.reshard_after_forward,
        offload=options.cpu_offload,
        whole_gradients=options.defer_gradient_sync,
    )


def _lengths(cfg: DictConfig, prompt: int | None, completion: int | None) -> tuple[int, int]:
    # If a length is not set, examples are as long as the limits of the data allow.
    limit = cfg.data.max_length
    prompt = min(cfg.data.max_prompt_length or limit // 2, limit) if prompt is None else prompt
    completion = limit - prompt if completion is None else completion
    if min(prompt, completion) < 1 or prompt + completion > limit:
        expected = f"prompt_tokens and completion_tokens within data.max_length={limit}"
        raise ValueError(f"estimate: expected {expected}, found {prompt} and {completion}")
    return prompt, completion


def _seconds(cfg: DictConfig, work: Work) -> float:
    # The host starts kernels while the device computes, so the slower of both decides.
    return max(work.seconds / float(cfg.estimate.utilisation), work.kernels * LAUNCH_SECONDS)


def _hours(cfg: DictConfig, plan: Plan, step: float, reference: float) -> float | None:
    """The time of all steps, and of the reference pass before them."""
    micro_step = plan.batching.examples * plan.division.devices
    steps, examples = float(cfg.trainer.max_steps), cfg.estimate.examples
    if steps <= 0 and examples is None:
        return None
    if steps <= 0:
        steps = float(cfg.trainer.max_epochs) * examples / (micro_step * plan.batching.accumulate)
    else:  # every example that is read counts as a different one
        examples = steps * micro_step * plan.batching.accumulate
    return float(steps * step + examples / micro_step * reference) / 3600


def _show(
    cfg: DictConfig,
    plan: Plan,
    longest: Traced,
    step: Work,
    *,
    total: float,
    fits: bool,
    seconds: float,
    hours: float | None,
) -> None:
    place = f"each of {plan.division.devices} × {cfg.estimate.gpu} ({cfg.strategy.name})"
    terminal.say(f"{cfg.model.path}, {cfg.loss.name}, {cfg.precision}, on {place}:")
    table = Table("memory", Column("GiB", justify="right"))
    for name, size in [*sorted(longest.memory.items(), key=lambda item: -item[1]), ("total", total)]:
        table.add_row(name, f"{size / GIB:.2f}")
    terminal.console.print(table)
    into = "fits into" if fits else "does not fit into"
    terminal.say(f"{total / GIB:.1f} GiB {into} the {plan.gpu.gib} of {cfg.estimate.gpu}")
    if longest.host_memory:
        waiting = "of the host's memory for each device, in which inputs of layers wait for the backward pass"
        terminal.say(f"{longest.host_memory / GIB:.2f} GiB {waiting}")
    rate = f"at {cfg.estimate.utilisation:.0%} of the published rates"
    terminal.say(
        f"a step: {step.operations / 1e12:,.1f}·10¹² operations and {step.kernels:,.0f} kernels on each device, "
        f"{seconds:.3g} s {rate}"
    )
    needed = "set estimate.examples (training examples) or trainer.max_steps"
    terminal.say(f"time: {needed if hours is None else f'{hours:.1f} h {rate}, reference included'}")
