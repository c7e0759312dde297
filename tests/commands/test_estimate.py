"""``scripts/estimate.py``: by hand, against the peak of a small run, and what it refuses."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig, MistralConfig

from halos.commands.estimate import estimate
from halos.commands.estimate_step import GIB
from tests import tiny
from tests.configs import compose
from tests.test_cli import call

MEASURE = """
import gc, sys
from pathlib import Path
from halos.commands.estimate import estimate
from halos.commands.train import train
from tests.configs import compose

def run(model, name):
    words = [
        "loss=dpo", "model=hf", f"model.path={model}", "data=files", f"data.train={sys.argv[3]}", "data.batch_size=8",
        "data.max_length=100", "data.max_prompt_length=60", "data.keep_together=1", "trainer.max_steps=2",
        "trainer.accelerator=cpu",
        "trainer.devices=1", "trainer.enable_progress_bar=false", "logger=none", "sampling.prompts=0",
        "checkpoint.every=1000", "model.reference=live", f"output_dir={sys.argv[4]}/{name}",
    ]
    cfg = compose(*words)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is held now
    before = resident("VmRSS")
    train(cfg)
    return resident("VmHWM") - before, estimate(cfg)

def resident(name):
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name)]
    return int(line.split()[1]) * 1024

run(sys.argv[1], "small")  # libraries and their buffers
measured, found = run(sys.argv[2], "large")
print("measured", measured, found["total"])
"""


def mistral(folder: Path, **sizes: Any) -> Path:
    MistralConfig(**sizes).save_pretrained(folder)  # the others are those of the 7B model
    return folder


def test_a_seven_billion_model_without_its_weights(tmp_path: Path) -> None:
    few = {"num_hidden_layers": 2, "max_position_embeddings": 2048}
    words = ("experiment=zephyr_kto", f"model.path={mistral(tmp_path / 'm', **few)}", "estimate.gpu=h100")
    found = estimate(compose(*words, "estimate.examples=100000"))
    layer = 4096 * (2 * 4096 + 2 * 1024) + 3 * 4096 * 14336 + 2 * 4096
    weights = 2 * 32000 * 4096 + 4096 + 2 * layer  # with 32 layers 7,241,732,096, as the model's card has it
    assert weights + 30 * layer == 7_241_732_096
    # Buffers, of a few bytes for each position, are not divided.
    assert found["memory"]["weights"] == pytest.approx(weights * 4 / 8, rel=1e-5)
    assert found["memory"]["optimizer"] == pytest.approx(weights * 8 / 8, rel=1e-5)
    assert found["fits"] == (found["total"] < 80 * GIB)
    # 32 examples a step; the reference pass has about a fifth of the operations of a step with checkpoints.
    steps = 100_000 / 32
    assert found["hours"] * 3600 > steps * found["step_seconds"]
    assert found["hours"] * 3600 == pytest.approx(steps * found["step_seconds"] * 1.25, rel=0.1)
    rate = found["operations"] / found["step_seconds"]
    assert 0.3 * 989e12 < rate < 0.6 * 989e12  # below estimate.utilisation, as memory takes time too


@pytest.mark.slow
def test_words_of_an_estimate(tmp_path: Path) -> None:
    words = ("experiment=zephyr_kto", f"model.path={mistral(tmp_path / 'm', num_hidden_layers=2)}")
    lengths = ("estimate.prompt_tokens=100", "estimate.completion_tokens=100")
    longest, average = estimate(compose(*words)), estimate(compose(*words, *lengths))
    assert longest["memory"] == average["memory"]
    assert longest["step_seconds"] > 2 * average["step_seconds"]
    assert longest["hours"] is None
    ten = estimate(compose(*words, "trainer.max_steps=10", *lengths))
    twenty = estimate(compose(*words, "trainer.max_steps=20", *lengths))
    assert twenty["hours"] == pytest.approx(2 * ten["hours"])
    alone = estimate(compose(*words, "strategy=auto", "trainer.devices=1"))
    assert alone["memory"]["weights"] == pytest.approx(8 * longest["memory"]["weights"], rel=1e-3)


def test_inputs_of_layers_wait_in_the_hosts_memory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("experiment=zephyr_kto", f"model.path={mistral(tmp_path / 'm', num_hidden_layers=2)}")
    on_device, on_host = (
        estimate(compose(*words, f"model.gradient_checkpointing={policy}")) for policy in ("true", "offload")
    )
    # In bfloat16. The last token of a completion is not fed, and mismatched completions are computed without gradient.
    assert on_device["host_memory"] == 0
    assert on_host["host_memory"] == 2 * 4 * (512 + 511) * 4096 * 2
    assert on_host["total"] < on_device["total"]
    assert on_host["step_seconds"] > on_device["step_seconds"]
    assert "0.06 GiB of the host's memory for each device, in which inputs of layers wait" in capsys.readouterr().out


@pytest.mark.slow
def test_seventy_billion_weights_with_adapters_are_traced_within_a_minute(tmp_path: Path) -> None:
    heads = {"num_attention_heads": 64, "num_key_value_heads": 8}
    sizes: dict[str, Any] = heads | {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80}
    LlamaConfig(vocab_size=128256, **sizes).save_pretrained(tmp_path)
    words = ["model=hf", f"model.path={tmp_path}", "model.lora.enabled=true", "model.gradient_checkpointing=true"]
    words += ["strategy=fsdp", "trainer.devices=8", "precision=bf16-true", "data.max_length=1024"]
    begin = time.process_time()
    found = estimate(compose(*words, "loss=dpo", "data.batch_size=4", "estimate.gpu=h100"))
    assert time.process_time() - begin < 60
    # 70.55·10⁹ weights in two bytes, over eight devices, and the adapters.
    assert found["memory"]["weights"] == pytest.approx(2 * 70.55e9 / 8, rel=0.01)
    assert found["fits"]


def test_what_cannot_be_estimated_is_refused(tmp_path: Path) -> None:
    for word, said in (
        ("estimate.gpu=tpu", "estimate.gpu: expected one of a10, .*; found 'tpu'"),
        ("estimate.utilisation=2", "estimate.utilisation: expected a share"),
        ("estimate.prompt_tokens=97", "within data.max_length=96, found 97 and -1"),
        ("trainer.devices=auto", "trainer.devices: expected a number for an estimate, found 'auto'"),
        ("strategy=deepspeed", "strategy of an estimate: expected one of auto, ddp, fsdp; found 'deepspeed'"),
        ("strategy=fsdp_tp", "strategy of an estimate: expected one of auto, ddp, fsdp; found 'fsdp_tp'"),
        ("data.batch_size=0", "data.batch_size: expected a whole number from 1 on, found 0"),
        ("trainer.accumulate_grad_batches=0", "trainer.accumulate_grad_batches: expected a whole number from 1 on"),
        ("strategy=fsdp strategy.trainer.replicas=2", "strategy.trainer.replicas: expected a divisor"),
        ("model.path=./nowhere", "model.path: ./nowhere could not be loaded"),
    ):
        with pytest.raises(ValueError, match=said):
            estimate(compose(*word.split()))


def test_refusals_import_neither_torch_nor_lightning(tmp_path: Path) -> None:
    heavy = "sorted({'torch', 'lightning', 'transformers'} & set(sys.modules))"
    code = (
        "import sys; from halos.cli import main_command; sys.argv = ['estimate', 'estimate.gpu=tpu']\n"
        f"try: main_command('estimate')\nexcept SystemExit: print({heavy})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert done.stdout == "[]\n"
    assert "error: estimate.gpu: expected one of a10, " in done.stderr


def test_the_command_leaves_no_folder_behind(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, tmp_path, "estimate", "loss=kto", "estimate.examples=1000") == 0
    assert not list(tmp_path.iterdir())
    assert "fits into the 80 of a100-80gb" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read in /proc")
def test_the_peak_of_a_small_run(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {
        "hidden_size": 512,
        "intermediate_size": 1408,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
    }
    small = tiny.save(tmp_path / "small", max_position_embeddings=256)
    large = tiny.save(tmp_path / "large", max_position_embeddings=256, num_hidden_layers=8, **sizes)
    words = [tiny.WORDS[n % len(tiny.WORDS)] for n in range(50)]
    row = '{{"prompt": "{}", "chosen": "{}", "rejected": "{}"}}\n'
    texts = [(" ".join(words), f"{w} {' '.join(words[:36])}", f"{w} {' '.join(words[5:41])}") for w in tiny.WORDS]
    (tmp_path / "pairs.jsonl").write_text(
        "".join(row.format(f"{a} {n}", b, c) for n, (a, b, c) in enumerate(texts * 2))
    )
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, small, large, tmp_path / "pairs.jsonl", tmp_path],
        capture_output=True, text=True, timeout=200, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    measured, expected = map(float, done.stdout.splitlines()[-1].split()[1:])
    assert expected == pytest.approx(measured, rel=0.1), (expected / 2**20, measured / 2**20)
