"""A mixture of experts with ``strategy=fsdp`` and ``ddp``: the losses, the router loss and the export of one device."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from halos.policy.loading import ModelSpec
from tests import architectures
from tests.fork import run_ranks
from tests.train_runs import run, train_as_rank

pytest.importorskip("peft")
pytestmark = [pytest.mark.ranks, pytest.mark.runs, pytest.mark.slow]

WORDS = (
    *("loss=dpo", "trainer.max_epochs=2", "model.reference=live", "optim.lr=3e-3", "optim.eps=1e-6"),
    *("data.source.size=48", "data.source.val_size=32"),
)
LORA = "model.lora.enabled=true"
CASES = {"fsdp": (), "fsdp lora": (LORA,), "ddp": (), "ddp lora": (LORA,)}


def run_on_a_rank(folder: Path, base: str) -> dict[str, Any]:
    return {
        name: train_as_rank(
            folder / name,
            *(*WORDS, base, *words, f"strategy={name.split()[0]}", "trainer.devices=2", "data.batch_size=2"),
        )
        for name, words in CASES.items()
    }


def test_runs_are_those_of_one_device(tmp_path: Path) -> None:
    tokenizer = ModelSpec(path="pkg://halos.toy/reference").tokenizer()
    model = architectures.model("mixtral", vocab_size=len(tokenizer), max_position_embeddings=256)
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "base")
    base = f"model.path={tmp_path / 'base'}"
    one = {words: run(tmp_path / f"one{len(words)}", *WORDS, base, *words) for words in {*CASES.values()}}
    for ranks in run_ranks(partial(run_on_a_rank, tmp_path, base), timeout=500):
        for name, words in CASES.items():
            expected, found = one[words], ranks[name]
            assert found["train_loss"] == pytest.approx(expected["train_loss"], rel=1e-5), name
            assert found["metrics"]["router_loss"] == pytest.approx(expected["metrics"]["router_loss"], rel=1e-5), name
    start = load_file(tmp_path / "base/model.safetensors")
    for name, words in CASES.items():
        mine, other = (load_file(tmp_path / run / "model/model.safetensors") for run in (name, f"one{len(words)}"))
        assert mine.keys() == other.keys() == start.keys()
        for tensor, values in other.items():
            torch.testing.assert_close(mine[tensor], values, rtol=0, atol=3e-5, msg=f"{name}: {tensor}")
            assert "expert" not in tensor or not torch.equal(values, start[tensor])
