"""Whole runs with ``strategy=fsdp``: the same results as on one device, half the memory, and checkpoints that move."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import hydra
import lightning.pytorch as pl
import pytest
import torch
from safetensors.torch import load_file

import halos.commands.assembly
from halos.commands.export import export
from halos.config.folder import config_folder
from halos.processes.collectives import local
from halos.sharding.consolidate import consolidate
from halos.sharding.fsdp import FSDP
from halos.sharding.reading import check_sharded
from tests.fork import run_ranks
from tests.train_runs import run, train_as_rank

pytestmark = [pytest.mark.ranks, pytest.mark.runs]

ASKED = "model.statistics=[entropy]"
# Three prompts do not divide over two ranks, which have to run the same number of forwards.
KL = ("sampling.kl=true", "sampling.kl_prompts=3", "sampling.validations=9")
WORDS = (
    "model.reference=live",
    "trainer.max_steps=5",
    "checkpoint.every=3",
    "optim.eps=1e-6",
    "optim.lr=1e-3",
    ASKED,
    *KL,
)
MOVING = ("reference_sync.every=2",)
BFLOAT16 = {"bf16-mixed": torch.float32, "bf16-true": torch.bfloat16}
TWO = ("trainer.devices=2", "data.batch_size=2", "strategy=fsdp")


class Counted(pl.Callback):
    """Elements that this process holds in a step: of gradients before the optimizer's work, of weights, optimizer state
    and reference after it."""

    def __init__(self) -> None:
        self.held: dict[str, int] = {}

    def on_before_optimizer_step(self, trainer: pl.Trainer, module: Any, optimizer: Any) -> None:
        self.held["gradients"] = sum(local(p.grad).numel() for p in module.parameters() if p.grad is not None)

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, *_: Any) -> None:
        optimizer = trainer.optimizers[0]
        weights = list(module.parameters())
        state = [value for entry in optimizer.state.values() for value in entry.values() if value.dim()]
        self.held |= {
            "weights": sum(local(p).numel() for p in weights),
            "optimizer": sum(local(value).numel() for value in state),
            "reference": sum(local(p).numel() for p in module.trained.reference.parameters()),
        }


def counted(train: Any, folder: Path, *words: str) -> tuple[dict[str, Any], dict[str, int]]:
    """The run's summary, and what the process held."""
    counter, callbacks = Counted(), halos.commands.assembly._callbacks
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(halos.commands.assembly, "_callbacks", lambda *pieces: [*callbacks(*pieces), counter])
        return train(folder, *words), counter.held


def runs_on_a_rank(folder: Path) -> list[Any]:
    checkpoint = f"resume='{folder}/auto/checkpoints/step_3.ckpt'"
    shared = (*WORDS, *TWO)
    sharded = "strategy.trainer.sharded_checkpoints=true"
    replies = ("sampling.prompts=2", "logger=tensorboard")
    found: list[Any] = [counted(train_as_rank, folder / "fsdp", *shared, "sampling.size=4", *replies)]
    cached = f"cache_dir={folder}/cache-{os.environ['RANK']}"
    found.append(train_as_rank(folder / "cached", *shared, "model.reference=cached", cached, sharded))
    found.append(train_as_rank(folder / "auto-fsdp", *shared, checkpoint))
    return found


def more_runs_on_a_rank(folder: Path) -> dict[str, dict[str, Any]]:
    ddp, sharded = "strategy=ddp", "strategy.trainer.sharded_checkpoints=true"
    ways = {
        "moving": MOVING,
        "auto-ddp": (ddp, f"resume='{folder}/auto/checkpoints/step_3.ckpt'"),
        "fsdp-ddp": (ddp, f"resume='{folder}/fsdp/checkpoints/step_3.ckpt'"),
        "folder-fsdp": (sharded, f"resume='{folder}/cached/checkpoints/step_3.ckpt'"),
    }
    return {name: train_as_rank(folder / name, *WORDS, *TWO, *words) for name, words in ways.items()}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("runs")
    one = counted(run, folder / "auto", *WORDS, "sampling.size=4")
    ranks = run_ranks(partial(runs_on_a_rank, folder), timeout=400)
    return {"folder": folder, "one": one, "ranks": ranks}


@pytest.fixture(scope="module")
def more(runs: dict[str, Any]) -> list[dict[str, dict[str, Any]]]:
    return run_ranks(partial(more_runs_on_a_rank, runs["folder"]), timeout=400)


def test_losses_and_metrics_are_those_of_one_device(runs: dict[str, Any]) -> None:
    expected = runs["one"][0]
    for (found, _), cached, _ in runs["ranks"]:
        assert found["train_loss"] == pytest.approx(expected["train_loss"], rel=1e-5)
        assert cached["train_loss"] == pytest.approx(expected["train_loss"], rel=1e-5)
        assert found["metrics"] == pytest.approx(expected["metrics"], rel=1e-3, abs=1e-4)
        assert cached["metrics"] == pytest.approx(expected["metrics"], rel=1e-3, abs=1e-4)
    assert expected["metrics"]["kl"] > 1e-4
    assert len(set(expected["train_loss"])) == 5
    assert expected["metrics"]["entropy"] > 0.1
    samples = runs["ranks"][0][0][0]["samples"]
    assert samples == pytest.approx(expected["samples"], abs=1e-4)


def test_the_exported_model_is_that_of_one_device(runs: dict[str, Any]) -> None:
    one, two = (load_file(runs["folder"] / name / "model" / "model.safetensors") for name in ("auto", "fsdp"))
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=0, atol=7e-5, msg=name)
    for file in ("config.json", "generation_config.json", "tokenizer.json"):
        assert (runs["folder"] / "fsdp/model" / file).read_bytes() == (
            runs["folder"] / "auto/model" / file
        ).read_bytes()


def test_each_process_holds_half_of_everything(runs: dict[str, Any]) -> None:
    _, alone = runs["one"]
    assert alone["weights"] == alone["gradients"] == alone["reference"] == alone["optimizer"] / 2 > 1e5
    for (_, held), *_ in runs["ranks"]:
        for name, elements in alone.items():
            assert held[name] == pytest.approx(elements / 2, rel=0.01), name


def test_checkpoints_move_between_strategies(runs: dict[str, Any]) -> None:
    expected = runs["one"][0]["train_loss"]
    for *_, resumed in runs["ranks"]:
        assert resumed["train_loss"] == pytest.approx(expected, rel=1e-5)
    folder = runs["folder"]
    for name, file in (("back", folder / "fsdp/checkpoints/step_3.ckpt"), ("whole", folder / "whole.ckpt")):
        if name == "whole":
            consolidate(folder / "cached/checkpoints/step_3.ckpt", file)
        summary = run(folder / name, *WORDS, f"resume='{file}'")
        assert summary["train_loss"] == pytest.approx(expected, rel=1e-5)
        assert summary["metrics"] == pytest.approx(runs["one"][0]["metrics"], rel=1e-3, abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["auto-ddp", "fsdp-ddp", "folder-fsdp"])
def test_checkpoints_move_to_ddp_and_from_a_folder(way: str, runs: dict[str, Any], more: Any) -> None:
    for rank in more:
        assert rank[way]["train_loss"] == pytest.approx(runs["one"][0]["train_loss"], rel=1e-5)


@pytest.mark.slow
def test_a_moving_reference_moves_between_strategies_too(runs: dict[str, Any], more: Any, tmp_path: Path) -> None:
    expected = run(tmp_path / "auto", *WORDS, *MOVING)["train_loss"]
    for rank in more:
        assert rank["moving"]["train_loss"] == pytest.approx(expected, rel=1e-5)
    still = runs["one"][0]["train_loss"]
    assert expected[:2] == still[:2]
    assert expected[2:] != pytest.approx(still[2:], rel=1e-5)
    checkpoint = runs["folder"] / "moving/checkpoints/step_3.ckpt"
    resumed = run(tmp_path / "resumed", *WORDS, *MOVING, f"resume='{checkpoint}'")
    assert resumed["train_loss"] == pytest.approx(expected, rel=1e-5)


def in_bfloat16_on_a_rank(folder: Path) -> list[dict[str, Any]]:
    return [train_as_rank(folder / precision, *WORDS, *TWO, f"precision={precision}") for precision in BFLOAT16]


@pytest.mark.slow
def test_bfloat16_follows_float32_and_its_mixed_form_keeps_float32_weights(
    runs: dict[str, Any], tmp_path: Path
) -> None:
    expected = runs["one"][0]["train_loss"]
    for summaries in run_ranks(partial(in_bfloat16_on_a_rank, tmp_path)):
        for summary in summaries:
            assert summary["train_loss"][0] == pytest.approx(0.5, abs=1e-6)  # the live reference is rounded alike
            assert summary["train_loss"] == pytest.approx(expected, rel=2e-2)
            assert summary["train_loss"] != pytest.approx(expected, rel=1e-5)
    for precision, dtype in BFLOAT16.items():
        model = load_file(tmp_path / precision / "model" / "model.safetensors")
        assert {tensor.dtype for tensor in model.values()} == {dtype}
        checkpoint = torch.load(tmp_path / precision / "checkpoints/last.ckpt", weights_only=True)
        assert {tensor.dtype for tensor in checkpoint["state_dict"].values()} == {dtype}


def test_a_sharded_checkpoint_is_exported_as_the_run_exported_it(runs: dict[str, Any], tmp_path: Path) -> None:
    for name in ("cached", "fsdp"):
        with hydra.initialize_config_dir(config_folder(), version_base="1.3"):
            words = [f"run={runs['folder'] / name}", f"output={tmp_path / name}"]
            folder = export(hydra.compose("export", words))
        expected = load_file(runs["folder"] / name / "model" / "model.safetensors")
        actual = load_file(folder / "model.safetensors")
        assert actual.keys() == expected.keys()
        assert all(torch.equal(actual[key], weight) for key, weight in expected.items())


def test_a_folder_that_is_no_whole_checkpoint_is_refused(runs: dict[str, Any], tmp_path: Path) -> None:
    complete = runs["folder"] / "cached/checkpoints/last.ckpt"
    assert check_sharded(complete) == complete
    (tmp_path / "whole.ckpt").touch()
    with pytest.raises(ValueError, match="exists"):
        consolidate(complete, tmp_path / "whole.ckpt")
    for missing in (".metadata", "meta.pt"):
        part = tmp_path / f"without{missing}"
        part.mkdir()
        for file in complete.iterdir():
            if file.name != missing:
                (part / file.name).write_bytes(file.read_bytes())
        with pytest.raises(ValueError, match="not one or is incomplete"):
            check_sharded(part)


def test_an_index_that_would_run_code_is_refused(runs: dict[str, Any], tmp_path: Path) -> None:
    complete = runs["folder"] / "cached/checkpoints/last.ckpt"
    (tmp_path / "meta.pt").write_bytes((complete / "meta.pt").read_bytes())
    (tmp_path / ".metadata").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(ValueError, match=r"unexpected os\.system"):
        check_sharded(tmp_path)


def test_buffers_of_offloaded_models_are_moved_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    strategy = FSDP(cpu_offload=True)
    strategy._model = torch.nn.BatchNorm1d(2)
    monkeypatch.setattr(FSDP, "root_device", torch.device("meta"))
    strategy.model_to_device()
    assert {parameter.device.type for parameter in strategy._model.parameters()} == {"cpu"}
    assert {buffer.device.type for buffer in strategy._model.buffers()} == {"meta"}
