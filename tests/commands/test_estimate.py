"""``scripts/estimate.py``: by hand, against the peak of a small run, and what it refuses."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import MistralConfig

from halos.commands.estimate import estimate
from halos.training.cost import GIB
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


def mistral(folder: Path) -> Path:
    MistralConfig().save_pretrained(folder)  # those of the 7B model
    return folder


def test_a_seven_billion_model_without_its_weights(tmp_path: Path) -> None:
    words = ("experiment=zephyr_kto", f"model.path={mistral(tmp_path / 'm')}")
    found = estimate(compose(*words, "estimate.examples=100000", "estimate.gpu=h100"))
    weights = 7_241_732_096  # as the model's card has it
    assert found["memory"]["weights"] == found["memory"]["gradients"] == weights * 4 / 8
    assert found["memory"]["optimizer"] == weights * 8 / 8
    assert found["fits"] == (found["total"] < 80 * GIB)
    assert found["hours"] == pytest.approx(100_000 * found["operations"] / (8 * 0.4 * 989e12) / 3600)
    assert estimate(compose(*words))["hours"] is None
    steps = estimate(compose(*words, "trainer.max_steps=10", "estimate.gpu=h100"))
    assert steps["hours"] == pytest.approx(found["hours"] * 320 / 100_000)
    alone = estimate(compose(*words, "strategy=auto", "trainer.devices=1"))
    assert not alone["fits"]


def test_what_cannot_be_estimated_is_refused(tmp_path: Path) -> None:
    for word, said in (
        ("estimate.gpu=tpu", "estimate.gpu: expected one of a10, .*; found 'tpu'"),
        ("estimate.utilisation=2", "estimate.utilisation: expected a share"),
        ("estimate.prompt_tokens=97", "within data.max_length=96, found 97 and -1"),
        ("model.lora.enabled=true", "expected model.lora.enabled=false"),
        ("trainer.devices=auto", "trainer.devices: expected a number for an estimate, found 'auto'"),
        ("strategy=deepspeed", "strategy of an estimate: expected one of auto, ddp, fsdp; found 'deepspeed'"),
        ("strategy=fsdp_tp", "strategy of an estimate: expected one of auto, ddp, fsdp; found 'fsdp_tp'"),
        ("model.path=./nowhere", "model.path: ./nowhere could not be loaded"),
    ):
        with pytest.raises(ValueError, match=said):
            estimate(compose(word))


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
    assert expected == pytest.approx(measured, rel=0.25), (expected / 2**20, measured / 2**20)
