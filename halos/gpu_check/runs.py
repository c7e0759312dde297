"""Whole runs of the toy world by the command: strategies, precisions, a stop and a resume, sampling."""

from __future__ import annotations

import importlib.util
import json
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

from halos.gpu_check.part import Numbers, Setting, Skipped, expect, need_gpu
from halos.policy.logprobs.compiling import check_compiler
from halos.processes.signals import EXIT_CODE
from halos.toy.model import build_tokenizer

QUICK = (
    *("loss=kto", "trainer.enable_progress_bar=false", "logger=none", "trainer.max_steps=12", "data.source.size=64"),
    *("data.source.val_size=8", "sampling.prompts=0", "sampling.kl=false", "sampling.size=0", "model.dropout=0.1"),
)
"""Twelve steps, with dropout: a run resumes only if its randomness does."""
BATCH = 16
"""Examples of a step, over all devices."""
AGREEMENT = 1e-3
"""The largest relative difference between losses of a step on one device and on several, in float32."""
RESUMED = {"cpu": 0.0, "cuda": 1e-4}
"""The same between a run that was stopped and one that was not. On a GPU sums have no fixed order."""


def command(setting: Setting, name: str, *words: str, devices: int = 1, readers: int | None = None) -> list[str]:
    """The words of a training run, whose outputs are in ``folder/name``; ``readers``: devices that read own data."""
    accelerator = "cuda" if setting.on_gpu else "cpu"
    where = (f"output_dir={setting.folder / name}", f"cache_dir={setting.folder / 'cache'}")
    batch_size = BATCH // (readers or devices)
    size = (f"trainer.accelerator={accelerator}", f"trainer.devices={devices}", f"data.batch_size={batch_size}")
    return [sys.executable, "-m", "halos.cli", "train", *QUICK, *where, *size, *words]


def losses(setting: Setting, name: str, *words: str, devices: int = 1, readers: int | None = None) -> list[float]:
    """The losses of a run's steps; a run that has finished is read only.

    Raises:
        ValueError: with the last lines of a run that failed.
    """
    summary = setting.folder / name / "summary.json"
    if not summary.exists():
        _run(command(setting, name, *words, devices=devices, readers=readers))
    return [float(loss) for loss in json.loads(summary.read_text(encoding="utf-8"))["train_loss"]]


def _run(words: list[str]) -> None:
    done = subprocess.run(words, capture_output=True, text=True, check=False)  # noqa: S603 (our words)
    expect(done.returncode == 0, "a command that succeeds", " | ".join((done.stdout + done.stderr).splitlines()[-3:]))


def _agree(one: list[float], other: list[float], limit: float) -> float:
    error = max(abs(a - b) / max(abs(a), 1e-3) for a, b in zip(one, other, strict=True))
    expect(error <= limit, f"losses that agree to {limit:g}", f"a relative difference of {error:.2g}")
    return error


def _plain(setting: Setting) -> list[float]:
    # On one device in float32, without dropout; most parts compare with it.
    return losses(setting, "plain", "model.dropout=0")


def precision(setting: Setting, name: str) -> Numbers:
    """Train in a lower precision: the losses are near those of float32."""
    if name == "16-mixed":
        need_gpu(setting, "16-mixed is for CUDA")
    lower = losses(setting, name, f"precision={name}", "model.dropout=0")
    return {"largest relative difference of a loss": _agree(_plain(setting), lower, 0.05)}


bf16_mixed = partial(precision, name="bf16-mixed")
bf16_true = partial(precision, name="bf16-true")
float16 = partial(precision, name="16-mixed")


def compiled(setting: Setting) -> Numbers:
    """``model.compile=true``: the same losses as without."""
    try:
        check_compiler(setting.device)
    except ValueError as problem:
        raise Skipped(str(problem)) from problem
    fast = losses(setting, "compiled", "model.dropout=0", "model.compile=true")
    return {"largest relative difference of a loss": _agree(_plain(setting), fast, AGREEMENT)}


def strategy(setting: Setting, words: tuple[str, ...], *, least: int = 2, group: int = 1) -> Numbers:
    """Train on several devices (on a CPU, processes): the same losses as on one.

    Args:
        setting: where it runs.
        words: of the command line.
        least: devices that it needs.
        group: devices that read the same data.
    """
    devices = least if not setting.on_gpu else setting.devices - setting.devices % least
    if devices < least:
        raise Skipped(f"it needs {least} GPUs, found {setting.devices}")
    devices = max(n for n in range(least, devices + 1, least) if BATCH % n == 0)
    name = "-".join(word.partition("=")[2] for word in words)
    several = losses(setting, f"several-{name}", "model.dropout=0", *words, devices=devices, readers=devices // group)
    return {"devices": devices, "largest relative difference of a loss": _agree(_plain(setting), several, AGREEMENT)}


ddp = partial(strategy, words=("strategy=ddp",))
fsdp = partial(strategy, words=("strategy=fsdp",))
hsdp = partial(strategy, words=("strategy=fsdp", "strategy.trainer.replicas=2"), least=2)
offload = partial(strategy, words=("strategy=fsdp", "strategy.trainer.cpu_offload=true"))
tensor_parallel = partial(strategy, words=("strategy=fsdp_tp", "strategy.tensor_parallel_size=2"), group=2)


def resumed(setting: Setting) -> Numbers:
    """Stop a run by SIGTERM in its middle and resume it: the losses of the steps are those of a run without a stop."""
    words: tuple[str, ...] = ("checkpoint.every=3", "resume=auto")
    devices = 2 if setting.devices > 1 and setting.on_gpu else 1
    words += ("strategy=fsdp",) if devices > 1 else ()
    whole = losses(setting, "whole", *words, devices=devices)
    code = _stopped(command(setting, "stopped", *words, devices=devices), setting.folder / "stopped")
    expect(code in (EXIT_CODE, 0), f"exit code {EXIT_CODE}", code)
    steps = losses(setting, "stopped", *words, devices=devices)
    return {
        "stopped": "yes" if code else "it had ended",
        "relative difference": _agree(whole, steps, RESUMED[setting.device]),
    }


def _stopped(words: list[str], folder: Path) -> int:
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:  # noqa: S603 (ours)
        while process.poll() is None and not any((folder / "checkpoints").glob("*.ckpt")):
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        return process.wait()


def vllm(setting: Setting) -> Numbers:
    """Sample a random policy with vLLM."""
    need_gpu(setting, "vLLM samples on CUDA here")
    if importlib.util.find_spec("vllm") is None:
        raise Skipped("vllm is not installed: pip install 'halos[vllm]'")
    _save_random_policy(setting.folder / "sampled")
    output = setting.folder / "samples.jsonl"
    words = ["engine=vllm", "data=toy", "size=8", "samples=2", "max_new_tokens=24", f"output={output}"]
    begin = time.perf_counter()
    _run([sys.executable, "-m", "halos.cli", "sample", f"policy={setting.folder / 'sampled'}", *words])
    count = sum(1 for _ in output.open(encoding="utf-8"))
    return {"samples": count, "seconds": time.perf_counter() - begin}


def _save_random_policy(folder: Path) -> None:
    # With heads of 64, as vLLM's kernels have no narrow ones; those of the toy policy have 16.
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = build_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=2,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
