"""Between two logged steps of a run the host waits for nothing that the device computes.

Every operation of a real ``fit`` is seen on a CPU (:mod:`halos.testing.device_work`): forward, backward, clipping,
optimizer, metrics, and what Lightning, callbacks and loggers do between two steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.utils.data import DataLoader

import halos.commands.assembly
from halos.data.batches.batch import Batch
from halos.data.batches.collate import Batches, collate
from halos.data.batches.order import MicroBatch
from halos.objectives import DPO, GRPO, KTO, NCA, PPO, SFT, SPPO, BradleyTerry, Mix, Objective
from halos.processes.collectives import data_ranks
from halos.sharding.fsdp import FSDP
from halos.testing.device_work import DeviceWork, watched
from halos.training.trainer import leave_signals_to_hosts
from tests.fork import run_ranks
from tests.loop_runs import OBJECTIVES, InOrder, objective_of, rows_for, trainer_for
from tests.test_strategies import as_rank, objective
from tests.train_runs import run, train_as_rank

SOME = (SFT, KTO, DPO, PPO, GRPO, NCA, SPPO, BradleyTerry, Mix)
"""One loss of each view and of each way to compare the examples of a step; the others are slow."""
OTHERS = [kind for kind in OBJECTIVES if kind not in SOME]
LOGGED = 3
"""Every third step is logged."""
UNLOGGED = (2, 4, 5)
"""Steps that are not logged, after the first one, which tries out what a model can do."""
Waits = dict[int, DeviceWork]


class Packed(InOrder):
    """The rows as a data module of a run has them: packed."""

    def _loader(self, rows: list[Any], order: list[MicroBatch]) -> DataLoader[Batch]:
        options: dict[str, Any] = {
            "mismatched": self.mismatched,
            "last_hidden": self.last_hidden,
            "packing": not self.last_hidden,
        }
        return DataLoader(Batches(rows, partial(collate, **options)), sampler=order, batch_size=None)


class Watcher(Callback):
    """Takes what was counted at the end of each optimizer step."""

    def __init__(self, work: DeviceWork) -> None:
        self.work, self.steps = work, Waits()

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step not in self.steps:
            self.steps[trainer.global_step] = self.work.take()


def steps_of(made: Objective, *, data: type[InOrder] = Packed, **options: Any) -> Waits:
    """Five steps of two micro-batches; on one device, unless the options say otherwise."""
    accumulate = 1 if made.needs.whole_step else 2
    defaults: dict[str, Any] = {"precision": "32-true", "gradient_clip_val": 0.3, "accumulate_grad_batches": accumulate}
    asked: dict[str, Any] = {"mismatched": made.needs.mismatched, "last_hidden": made.needs.last_hidden}
    with watched() as work:
        watcher = Watcher(work)
        trainer = trainer_for(watcher, **defaults | {"log_every_n_steps": LOGGED} | options)
        size = 8 // accumulate // data_ranks(trainer)[1]
        leave_signals_to_hosts(trainer)
        rows = rows_for(type(made), 40, seed=3)
        trainer.fit(made, datamodule=data(rows, batch_size=size, **asked))
    return watcher.steps


def unlogged(steps: Waits) -> list[str]:
    assert set(steps) >= {*UNLOGGED, LOGGED}
    assert steps[LOGGED].waits  # the counter does count
    return [wait for step in UNLOGGED for wait in steps[step].waits]


@pytest.mark.parametrize("kind", SOME)
def test_a_step_waits_for_nothing(kind: type[Objective]) -> None:
    assert unlogged(steps_of(objective_of(kind))) == []


@pytest.mark.slow
@pytest.mark.parametrize("kind", OTHERS)
def test_a_step_of_every_other_loss_waits_for_nothing(kind: type[Objective]) -> None:
    assert unlogged(steps_of(objective_of(kind))) == []


def test_padded_rows_wait_for_nothing() -> None:
    assert unlogged(steps_of(objective_of(KTO), data=InOrder)) == []


@pytest.mark.runs
def test_a_whole_run_waits_for_nothing(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with watched() as work:
        watcher = Watcher(work)
        monkeypatch.setattr(halos.commands.assembly, "build_callbacks", lambda cfg: [watcher])
        words = ("trainer.enable_progress_bar=true", "logger=tensorboard", f"trainer.log_every_n_steps={LOGGED}")
        run(tmp_path, "loss=kto", *words)
    # Lightning and the bar read metrics, which are in the host's memory (see the next test).
    readers = ("apply_func.py", "reporting/progress.py")
    assert [wait for wait in unlogged(watcher.steps) if not any(reader in wait for reader in readers)] == []


def test_metrics_of_a_progress_bar_are_in_the_memory_of_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    # Lightning would make them on the module's device, where reading them raises here.
    monkeypatch.setattr(SFT, "device", torch.device("meta"))
    steps_of(objective_of(SFT), enable_progress_bar=True)


# Under strategies, where each process waits for others only


def waits_of(strategy: str, kinds: Sequence[type[Objective]]) -> dict[str, tuple[list[str], int]]:
    found = {}
    for kind in kinds:
        chosen: Any = FSDP() if strategy == "fsdp" else strategy
        steps = steps_of(objective(kind, chosen), strategy=chosen, ranks=2)
        found[kind.__name__] = unlogged(steps), steps[UNLOGGED[0]].collectives.total()
    return found


def check_ranks(strategy: str, kinds: Sequence[type[Objective]]) -> None:
    for found in run_ranks(partial(as_rank, waits_of, strategy, kinds), timeout=400):
        assert {name: waits for name, (waits, _) in found.items() if waits} == {}
        assert all(collectives > 0 for _, collectives in found.values())


@pytest.mark.ranks
@pytest.mark.parametrize("strategy", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_ranks_wait_for_each_other_only(strategy: str) -> None:
    check_ranks(strategy, [KTO])


@pytest.mark.ranks
@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_ranks_of_other_losses_wait_for_each_other_only(strategy: str) -> None:
    check_ranks(strategy, [SFT, DPO, PPO, GRPO, SPPO, BradleyTerry, Mix])


def whole_run(folder: Path, strategy: str) -> Waits:
    with watched() as work, pytest.MonkeyPatch.context() as patch:
        watcher = Watcher(work)
        patch.setattr(halos.commands.assembly, "build_callbacks", partial(_only, watcher))
        words = (f"strategy={strategy}", "trainer.devices=2", "data.batch_size=1", "trainer.max_steps=6")
        train_as_rank(folder, "loss=kto", f"trainer.log_every_n_steps={LOGGED}", *words)
    return watcher.steps


def _only(watcher: Watcher, cfg: Any) -> list[Callback]:
    return [watcher]


@pytest.mark.ranks
@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_ranks_of_a_whole_run_wait_for_each_other_only(strategy: str, tmp_path: Path) -> None:
    for steps in run_ranks(partial(whole_run, tmp_path, strategy), timeout=400):
        # The hosts exchange signals after each step.
        assert {wait for wait in unlogged(steps) if "processes/collectives.py" not in wait} == set()


# The counter


def reads(values: Tensor) -> dict[str, Callable[[], Any]]:
    mask = values > 0
    return {
        "_local_scalar_dense": values.sum().item,
        "nonzero": mask.nonzero,
        "index": lambda: values[mask],
        "masked_select": lambda: values.masked_select(mask),
        "equal": lambda: torch.equal(values, values),
        "tolist": values.tolist,
        "numpy": values.numpy,
        "tensor": lambda: torch.tensor([1.0], device=values.device),
        "new_tensor": lambda: values.new_tensor([1.0]),
        "_unique2": values.unique,
        "repeat_interleave": lambda: values.repeat_interleave(mask.long()),
    }


@pytest.mark.parametrize("name", reads(torch.ones(2)))
def test_the_counter_sees_what_waits(name: str) -> None:
    values = torch.tensor([1.0, 2.0])
    with watched() as work:
        reads(values)[name]()
    assert [wait.split()[0] for wait in work.waits] == [name]
    assert "test_waits.py" in work.waits[0]


def test_the_counter_counts_kernels_and_no_views() -> None:
    weights = torch.ones(2, 3, requires_grad=True)
    with watched() as work:
        (weights.view(3, 2) * 2).sum().backward()
    # Forward: the product and the sum. Backward: the gradient that backward() starts from, and the product.
    assert work.kernels == {"mul": 2, "sum": 1, "ones_like": 1}
    assert work.waits == []
