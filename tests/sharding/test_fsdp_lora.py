"""LoRA with ``strategy=fsdp``: adapters and base divided, small checkpoints that move, the losses of one device."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.fork import run_ranks
from tests.sharding.test_fsdp import counted
from tests.train_runs import run, train_as_rank

pytest.importorskip("peft")
pytestmark = [pytest.mark.slow, pytest.mark.ranks, pytest.mark.runs]

WORDS = (
    "model.lora.enabled=true",
    "model.reference=live",
    "trainer.max_steps=5",
    "checkpoint.every=3",
    "optim.eps=1e-6",
    "optim.lr=3e-3",
)
FSDP = ("trainer.devices=2", "data.batch_size=2", "strategy=fsdp")
DDP = (*FSDP, "strategy=ddp")
OFF = "model.reference=adapter"
FOLDERS = "strategy.trainer.sharded_checkpoints=true"


def continued(folder: Path) -> tuple[str, ...]:
    return (OFF, f"model.lora.path={folder}/one/model", "model.lora.export=adapter")


def live_on_a_rank(folder: Path) -> tuple[dict[str, Any], dict[str, int]]:
    return counted(train_as_rank, folder / "live", *WORDS, *FSDP, "sampling.size=4")


def more_runs_on_a_rank(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}

    def train(name: str, *words: str) -> None:
        found[name] = train_as_rank(folder / name, *WORDS, *words)

    train("off", *FSDP, OFF, FOLDERS)
    train("control", *FSDP, "loss=csft")
    train("continued", *FSDP, *continued(folder))
    train("from one", *FSDP, f"resume='{folder}/merged/checkpoints/step_3.ckpt'")
    train("from folder", *FSDP, OFF, f"resume='{folder}/off/checkpoints/step_3.ckpt'", FOLDERS)
    train("to ddp", *DDP, f"resume='{folder}/live/checkpoints/step_3.ckpt'")
    return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("runs")
    one, alone = counted(run, folder / "one", *WORDS, "model.lora.export=adapter", "sampling.size=4")
    merged = run(folder / "merged", *WORDS)
    ranks = run_ranks(partial(live_on_a_rank, folder), timeout=400)
    return {"folder": folder, "one": one, "alone": alone, "merged": merged, "ranks": ranks}


@pytest.fixture(scope="module")
def more(runs: dict[str, Any]) -> list[dict[str, Any]]:
    return run_ranks(partial(more_runs_on_a_rank, runs["folder"]), timeout=400)


def test_losses_and_samples_are_those_of_one_device(runs: dict[str, Any]) -> None:
    expected = runs["one"]
    assert len(set(expected["train_loss"])) == 5
    for live, _ in runs["ranks"]:
        assert live["train_loss"] == pytest.approx(expected["train_loss"], rel=1e-5)
        assert live["metrics"] == pytest.approx(expected["metrics"], rel=1e-3, abs=1e-4)
    assert runs["ranks"][0][0]["samples"] == pytest.approx(expected["samples"], abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["off", "from one", "from folder", "to ddp"])
def test_other_references_and_resumed_runs_are_those_of_one_device(name: str, runs: dict[str, Any], more: Any) -> None:
    expected = runs["one"]
    for ranks in more:
        assert ranks[name]["train_loss"] == pytest.approx(expected["train_loss"], rel=1e-5)
        assert ranks[name]["metrics"] == pytest.approx(expected["metrics"], rel=1e-3, abs=1e-4)


@pytest.mark.slow
def test_rows_of_new_tokens_and_a_continued_adapter_too(runs: dict[str, Any], more: Any, tmp_path: Path) -> None:
    for name, words in (("control", ("loss=csft",)), ("continued", continued(runs["folder"]))):
        expected = run(tmp_path / name, *WORDS, *words)["train_loss"]
        for ranks in more:
            assert ranks[name]["train_loss"] == pytest.approx(expected, rel=1e-5), name
    folder = runs["folder"]
    one, two = (load_file(folder / name / "model/adapter_model.safetensors") for name in ("one", "continued"))
    assert one.keys() == two.keys()


def test_what_is_exported_is_that_of_one_device(runs: dict[str, Any]) -> None:
    folder = runs["folder"]
    one, two = (load_file(folder / name / "model/model.safetensors") for name in ("merged", "live"))
    start = load_file(Path("halos/toy/reference/model.safetensors"))
    assert one.keys() == two.keys() == start.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=0, atol=3e-5, msg=name)
    assert any(not torch.equal(two[name], tensor) for name, tensor in start.items())


def test_each_process_holds_half_of_everything(runs: dict[str, Any]) -> None:
    alone = runs["alone"]
    assert alone["gradients"] == alone["optimizer"] / 2 < alone["weights"] / 2
    for _, held in runs["ranks"]:
        for name, elements in alone.items():
            assert held[name] == pytest.approx(elements / 2, rel=0.01), name


def test_checkpoints_hold_adapters_alone_and_move_to_one_device(runs: dict[str, Any], tmp_path: Path) -> None:
    file = runs["folder"] / "live/checkpoints/step_3.ckpt"
    state = torch.load(file, weights_only=True)["state_dict"]
    assert {name.rpartition(".default.")[2] for name in state} == {"weight", "backbone.base_fingerprint"}
    summary = run(tmp_path / "back", *WORDS, f"resume='{file}'")
    assert summary["train_loss"] == pytest.approx(runs["one"]["train_loss"], rel=1e-5)
