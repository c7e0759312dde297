"""Every objective trains the same on one device, under DDP and under FSDP2; what moves between them, and how much
each process holds."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins.precision import DoublePrecision
from lightning.pytorch.utilities import rank_zero_only

from halos.objectives import BCO, DPO, GRPO, KTO, PPO, SFT, BradleyTerry, Mix, Objective
from halos.policy.backbone import Backbone
from halos.policy.checkpointing import checkpoint_layers
from halos.processes.collectives import full_tensor
from halos.sharding.fsdp import FSDP
from tests.fork import run_ranks
from tests.host_memory import offloaded
from tests.loop_runs import OBJECTIVES, Run, fit, objective_of, rows_for, trainer_for

pytestmark = pytest.mark.ranks


def objective(kind: type[Objective], strategy: Any, *, checkpointing: bool | str = False, **options: Any) -> Objective:
    """A tiny objective, its backbone divided as the strategy says."""
    made = objective_of(kind, moved=0.1, **options)
    (backbone,) = made._source
    assert isinstance(backbone, Backbone)

    def divided(*, reference: bool, sharding: Any) -> Backbone:
        checkpoint_layers(backbone.policy, checkpointing)
        if isinstance(strategy, FSDP):
            strategy.sharding.shard(backbone)
        return backbone

    backbone.make = divided  # type: ignore[method-assign]
    return made


def as_rank(function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """To be called on a rank; Lightning has read another's number before the fork."""
    rank_zero_only.rank = int(os.environ["LOCAL_RANK"])  # type: ignore[attr-defined]
    return function(*args, **options)


def run(
    kind: type[Objective], strategy: Any, *, ranks: int = 2, accumulate: int = 1, num_nodes: int = 1, **options: Any
) -> Run:
    rows = rows_for(kind, 12, seed=1)
    parts = ranks // getattr(strategy, "tensor_parallel_size", 1) * accumulate
    found = fit(
        objective(kind, strategy, **options),
        rows,
        batch_size=6 // parts,
        val=rows[:6],
        strategy=strategy,
        ranks=ranks // num_nodes,
        num_nodes=num_nodes,
        precision=None,
        plugins=[DoublePrecision()],  # Lightning would refuse 64-true for its model-parallel strategy, which can do it
        gradient_clip_val=0.3,
        accumulate_grad_batches=accumulate,
    )
    found.gradients = [{name: full_tensor(value) for name, value in step.items()} for step in found.gradients]
    found.weights = {name: full_tensor(value) for name, value in found.weights.items()}
    return found


Case = tuple[type[Objective], str]
CASES: list[Case] = [(kind, strategy) for kind in OBJECTIVES for strategy in ("ddp", "fsdp")]
SOME: list[Case] = [(kind, "fsdp") for kind in (SFT, KTO, DPO, PPO, BCO, GRPO, BradleyTerry, Mix)]
SOME += [(PPO, "ddp"), (Mix, "ddp")]
"""One loss of each way to divide a step, and DDP where tests/loop does not; the others are slow."""
OTHERS = [case for case in CASES if case not in SOME]


def trained(cases: list[Case]) -> dict[Case, Run]:
    return {(kind, strategy): run(kind, FSDP() if strategy == "fsdp" else strategy) for kind, strategy in cases}


@pytest.fixture(scope="module")
def some() -> dict[Case, Run]:
    return run_ranks(partial(as_rank, trained, SOME))[0]


@pytest.fixture(scope="module")
def others() -> dict[Case, Run]:
    return run_ranks(partial(as_rank, trained, OTHERS))[0]


def assert_alike(found: Run, expected: Run) -> None:
    assert len(found.steps) == len(expected.steps) == 2
    torch.testing.assert_close(found.gradients, expected.gradients, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(found.weights, expected.weights, rtol=1e-6, atol=1e-8)
    for mine, theirs in zip([*found.steps, found.val], [*expected.steps, expected.val], strict=True):
        names = {name for name in theirs if not name.endswith("per_second")}
        assert {name: mine[name] for name in names} == pytest.approx({n: theirs[n] for n in names}, rel=1e-6, abs=1e-8)


@pytest.mark.parametrize(("kind", "strategy"), SOME)
def test_two_processes_train_as_one(kind: type[Objective], strategy: str, some: dict[Case, Run]) -> None:
    assert_alike(some[kind, strategy], run(kind, "auto", ranks=1))


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "strategy"), OTHERS)
def test_two_processes_train_every_other_loss_as_one(
    kind: type[Objective], strategy: str, others: dict[Case, Run]
) -> None:
    assert_alike(others[kind, strategy], run(kind, "auto", ranks=1))


def other_ways() -> dict[str, Run]:
    return {
        "accumulated": run(SFT, FSDP(), accumulate=3),
        "deferred": run(SFT, FSDP(defer_gradient_sync=True), accumulate=3),
        "kept whole": run(SFT, FSDP(reshard_after_forward=False)),
        "replicated": run(SFT, FSDP(replicas=2)),
        "checkpointed": run(SFT, FSDP(), checkpointing=True),
        "selective": run(SFT, FSDP(), checkpointing="selective"),
        "inputs on the host": offloaded(run, SFT, FSDP(), checkpointing="offload"),
        "offloaded": run(SFT, FSDP(cpu_offload=True)),
    }


@pytest.mark.slow
def test_options_of_fsdp_change_no_number() -> None:
    expected = run(SFT, "auto", ranks=1)
    for found in run_ranks(partial(as_rank, other_ways))[0].values():
        assert_alike(found, expected)


# Two nodes of one process each, as torchrun describes them, over loopback


def on_a_node() -> tuple[Run, dict[str, int]]:
    rank = os.environ["RANK"]
    os.environ |= {
        "TORCHELASTIC_RUN_ID": "none",
        "GROUP_RANK": rank,
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "1",
    }
    rank_zero_only.rank = int(rank)  # type: ignore[attr-defined]
    made = trainer_for(ranks=1, strategy=FSDP(), num_nodes=2, precision="32-true")
    seen = {"world": made.world_size, "rank": made.global_rank, "node": made.node_rank, "local": made.local_rank}
    return run(SFT, FSDP(), num_nodes=2), seen


@pytest.mark.slow
def test_two_nodes_train_as_one() -> None:
    expected = run(SFT, "auto", ranks=1)
    for rank, (found, seen) in enumerate(run_ranks(on_a_node)):
        assert seen == {"world": 2, "rank": rank, "node": rank, "local": 0}
        assert_alike(found, expected)
