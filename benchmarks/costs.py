"""The cost of one example as prompts, completions, completions per prompt or the vocabulary grow; and of a product."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks import plain
from benchmarks.inputs import llama
from benchmarks.job import Job
from benchmarks.roofline import Product, clock_for, rate
from halos.data.batches.collate import collate
from halos.data.rows.token_rows import Row
from halos.objectives import KTO
from halos.policy.backbone import Backbone
from halos.policy.kernels.cpu import use_cpu_kernels

ROUNDS = 5


def rows_of(*, examples: int, prompt: int, completion: int, per_prompt: int, vocabulary: int) -> list[Row]:
    """Labelled completions of random tokens with y', ``per_prompt`` of them for each prompt."""
    draw = random.Random(0)

    def ids(length: int) -> tuple[int, ...]:
        return tuple(draw.choices(range(vocabulary), k=length))

    prompts = [ids(prompt) for _ in range(-(-examples // per_prompt))]
    completions = [ids(completion) for _ in range(examples)]
    return [
        Row(
            *(str(n), n // per_prompt, prompts[n // per_prompt]),
            (completions[n], completions[(n + per_prompt) % examples]),
            desirable=n % 2 == 0,
        )
        for n in range(examples)
    ]


def cost(job: Job, folder: Path) -> dict[str, Any]:
    """Seconds an example, of ours and of the plain loop: KTO forward and backward, reference included, no optimizer."""
    from transformers import LlamaForCausalLM, set_seed

    shape = dict(job.shape)
    sizes = {name: shape.pop(name) for name in ("hidden", "layers")}
    rows = rows_of(examples=job.batch_size, **shape)
    set_seed(job.seed)
    policy = LlamaForCausalLM(llama(**sizes, vocabulary=shape["vocabulary"])).train()
    use_cpu_kernels(policy)
    # A live reference here: its packed forward is what a run pays for it once, before the first step.
    objective = KTO(Backbone(policy, with_reference=True, head_chunk=job.head_chunk))
    objective.configure_model()
    reference = deepcopy(policy).eval()

    def ours() -> None:
        with plain.cast_to(job.precision):
            batch = collate(rows, mismatched=True, packing=True)
            terms = objective.compute_batch(batch)[0].loss.values()
        torch.stack([term.total / len(batch) for term in terms]).sum().backward()

    def usual() -> None:
        with plain.cast_to(job.precision):
            loss = plain.kto(policy, reference, rows)
        loss.backward()

    found = _alternate({"ours": ours, "plain": usual}, policy)
    return {name: seconds / len(rows) for name, seconds in found.items()}


def _alternate(steps: dict[str, Callable[[], None]], policy: Any) -> dict[str, float]:
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(ROUNDS + 1):
        for name, step in steps.items():
            policy.zero_grad()
            start = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - start)
    return {name: median(values[1:]) for name, values in seconds.items()}  # the first round warms up


def best_rate(job: Job, folder: Path) -> dict[str, Any]:
    """Operations per second of matrix products: the most over sizes as in the job's model and large squares."""
    from transformers import AutoConfig

    text = AutoConfig.from_pretrained(job.model).get_text_config()
    products = (
        Product(2048, 2048, 2048),
        Product(1024, text.hidden_size, text.intermediate_size),
        Product(1024, text.intermediate_size, text.hidden_size),
    )
    return {"rate": max(rate(product, job.precision, clock_for(job.threads)) for product in products)}
