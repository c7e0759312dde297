"""DPO on a random Llama: this project beside a plain loop, which pads, and TRL where it is installed."""

from __future__ import annotations

import importlib.util
import random
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from halos.checks import check_choice
from halos.data.batches.collate import collate
from halos.data.rows.token_rows import Row
from halos.gpu_check.part import Numbers, Setting, Skipped, need_gpu
from halos.loop.steps import Steps
from halos.objectives import DPO
from halos.policy.backbone import Backbone
from halos.policy.logprobs.packed import attend_by
from halos.training.cost import forward_operations
from halos.training.gpus import gpu_named

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ROUNDS = 5
PROMPT, COMPLETION = 192, 128


def model_for(setting: Setting) -> PreTrainedModel:
    """A Llama of 12 layers and 300 million weights; on a CPU a small one."""
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, layers = (1024, 12) if setting.on_gpu else (64, 2)
    config = LlamaConfig(
        vocab_size=32_000 if setting.on_gpu else 1000,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        max_position_embeddings=1024,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    nn.Module.to(model, setting.device)  # whose types mypy reads, other than the model's own
    return model


@cache
def rows(count: int, vocabulary: int) -> tuple[Row, ...]:
    """Pairs of uneven lengths, as feedback has them."""
    draw = random.Random(0)

    def ids(most: int) -> tuple[int, ...]:
        return tuple(draw.randrange(vocabulary) for _ in range(draw.randint(most // 4, most)))

    return tuple(Row(str(n), n, ids(PROMPT), (ids(COMPLETION), ids(COMPLETION))) for n in range(count))


Step = Callable[[], Tensor]
"""One forward pass; returns the loss."""


def ours(setting: Setting, attention: str = "pieces") -> Numbers:
    """This project's DPO with a live reference."""
    check_choice("attention", attention, ("pieces", "flex", "varlen"))
    if attention != "pieces":
        need_gpu(setting, "CPUs attend piece by piece")
    backbone = Backbone(model_for(setting), with_reference=True, head_chunk="auto")
    for member in backbone.with_reference_backbone():
        attend_by(member.policy, attention)
    objective = DPO(backbone)
    objective.configure_model()
    examples = _examples(setting)
    steps = Steps()

    def forward() -> Tensor:
        batch = collate(examples, packing=True).pin_memory() if setting.on_gpu else collate(examples, packing=True)
        output, metrics = objective.compute_batch(batch.to(setting.device, non_blocking=True))
        steps.to(setting.device).add(batch, metrics, None)
        return torch.stack([term.total / len(batch) for term in output.loss.values()]).sum()

    return _measured(setting, backbone.policy, forward)


def plain(setting: Setting) -> Numbers:
    """The usual loop: padded rows, all logits, a live reference."""
    policy, reference = model_for(setting), model_for(setting).eval().requires_grad_(False)
    examples = _examples(setting)

    def forward() -> Tensor:
        ids, attended, scored = (tensor.to(setting.device) for tensor in _pad(examples))
        with torch.no_grad():
            wanted = _logprobs(reference, ids, attended, scored)
        chosen, rejected = (_logprobs(policy, ids, attended, scored) - wanted).chunk(2)
        return -logsigmoid(0.1 * (chosen - rejected)).mean()

    return _measured(setting, policy, forward)


def trl(setting: Setting) -> Numbers:
    """TRL's DPO trainer on the same rows; the seconds are those of its steps."""
    for package, hint in (("trl", "pip install 'halos[bench]'"), ("benchmarks", "run it in a checkout of the project")):
        if importlib.util.find_spec(package) is None:
            raise Skipped(f"{package} is missing: {hint}")
    from transformers import AutoTokenizer

    from benchmarks import inputs, trl_side

    folder = inputs.synthetic_model(setting.folder, hidden=64, layers=1, vocabulary=1000)
    model, examples = model_for(setting), _examples(setting)
    made = trl_side.trainer(
        "dpo",
        examples * ROUNDS,
        model=model,
        tokenizer=AutoTokenizer.from_pretrained(folder),
        folder=setting.folder / "trl",
        cpu=not setting.on_gpu,
        bf16=setting.on_gpu,
        per_device_train_batch_size=len(examples),
        learning_rate=1e-6,
        max_length=1024,
    )
    _reset_peak(setting)
    _, seconds = trl_side.train(made)
    return _rates(setting, model, seconds / ROUNDS)


def _examples(setting: Setting) -> list[Row]:
    return list(rows(32 if setting.on_gpu else 4, 32_000 if setting.on_gpu else 1000))


def _measured(setting: Setting, policy: PreTrainedModel, forward: Step) -> Numbers:
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-6, fused=True)
    cast: Callable[[], AbstractContextManager[object]] = nullcontext
    if setting.on_gpu:
        cast = lambda: torch.autocast("cuda", torch.bfloat16)  # noqa: E731
    begin = 0.0
    for number in range(ROUNDS + 2):
        if number == 2:  # the first two warm up and compile
            _wait(setting)
            _reset_peak(setting)
            begin = time.perf_counter()
        with cast():
            loss = forward()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    _wait(setting)
    return _rates(setting, policy, (time.perf_counter() - begin) / ROUNDS)


def _rates(setting: Setting, policy: PreTrainedModel, seconds: float) -> Numbers:
    """Rates by the tokens and operations that DPO needs, each prompt computed once, whatever was computed."""
    examples = _examples(setting)
    tokens = sum(len(row.prompt) + sum(map(len, row.branches)) for row in examples)
    # The policy's backward pass takes as many as two forward passes, and the reference has a forward pass.
    needed = 4 * forward_operations(policy, tokens, tokens / 2 / len(examples))
    numbers: dict[str, float | str] = {"seconds a step": seconds, "needed tokens a second": tokens / seconds}
    if setting.on_gpu:
        name = torch.cuda.get_device_name()
        gpu = gpu_named(name)
        unknown = f"unknown: {name} is not in halos/training/gpus.py"
        numbers["MFU"] = unknown if gpu is None else needed / seconds / (1e12 * gpu.bfloat16)
        numbers["peak memory, GiB"] = torch.cuda.max_memory_allocated() / 2**30
    return numbers


def _wait(setting: Setting) -> None:
    if setting.on_gpu:
        torch.cuda.synchronize()


def _reset_peak(setting: Setting) -> None:
    if setting.on_gpu:
        torch.cuda.reset_peak_memory_stats()


def _pad(examples: Sequence[Row]) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, attended and scored tokens [2B, T] of all chosen and then all rejected completions."""
    branches = [(row.prompt, row.branches[side]) for side in (0, 1) for row in examples]
    width = max(len(prompt) + len(branch) for prompt, branch in branches)
    ids = torch.zeros(len(branches), width, dtype=torch.long)
    attended, scored = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
    for n, (prompt, branch) in enumerate(branches):
        length = len(prompt) + len(branch)
        ids[n, :length] = torch.tensor(prompt + branch)
        attended[n, :length] = 1
        scored[n, len(prompt) : length] = True
    return ids, attended, scored


def _logprobs(model: PreTrainedModel, ids: Tensor, attended: Tensor, scored: Tensor) -> Tensor:
    logits = model(input_ids=ids, attention_mask=attended, use_cache=False).logits[:, :-1].float()
    tokens = logits.log_softmax(-1).gather(2, ids[:, 1:, None])[:, :, 0]
    total: Tensor = (tokens * scored[:, 1:]).sum(1)
    return total
