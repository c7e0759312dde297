"""What all objectives share, trained by a Lightning Trainer on a tiny Llama."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers.logger import DummyLogger
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.data import DataLoader

from halos import objectives
from halos.data.batches.collate import Batch, Batches, collate
from halos.data.batches.order import MicroBatch, validation_order
from halos.data.rows.token_rows import Row
from halos.loop.steps import Step, Steps
from halos.metrics import Mean
from halos.objectives import (
    BCO,
    CSFT,
    DPO,
    GRPO,
    IPO,
    KTO,
    PPO,
    SFT,
    APODown,
    APOZero,
    BradleyTerry,
    Mix,
    Needs,
    Objective,
    Output,
    RobustDPO,
)
from halos.optim import AdamW
from halos.policy.backbone import Backbone
from halos.policy.logprobs.completions import LogProbs
from halos.processes.collectives import data_ranks
from tests import tiny
from tests.fork import run_ranks

REQUIRED: dict[Any, dict[str, Any]] = {
    Mix: {"parts": {"kto": KTO, "bco": partial(BCO, beta=0.2)}, "weights": {"kto": 1.0, "bco": 0.5}}
}
"""Parameters without a default."""


def described(kind: Any, **parameters: Any) -> Objective:
    """The objective without a backbone, for what it says of itself."""
    return kind if isinstance(kind, Objective) else kind(**REQUIRED.get(kind, {}), **parameters)


OBJECTIVES = [
    kind
    for kind in vars(objectives).values()
    if isinstance(kind, type) and issubclass(kind, Objective) and kind is not Objective
]
WITH_REFERENCE = [kind for kind in OBJECTIVES if described(kind).needs.reference]
COUPLED = [KTO, BCO, Mix, PPO]
"""Objectives whose loss has something that all examples of a micro-batch share."""
PER_EXAMPLE_OR_TOKEN = [kind for kind in OBJECTIVES if kind not in COUPLED]
SPEED = {"train/examples_per_second", "train/tokens_per_second"}

# A model, rows and a training run


def tiny_backbone(
    *, with_reference: bool = True, moved: float = 0.0, dropout: float = 0.0, key_value_heads: int = 1
) -> Backbone:
    """The same in each call; ``moved`` flattens what the policy predicts, which makes random tokens likelier than
    they are under the reference."""
    model = tiny.model(attention_dropout=dropout, num_key_value_heads=key_value_heads)
    backbone = Backbone(model, with_reference=with_reference)
    with torch.no_grad():
        for parameter in backbone.policy.parameters():
            parameter *= 1 - moved
    return backbone


def objective_of(
    kind: type[Objective], *, moved: float = 0.0, dropout: float = 0.0, key_value_heads: int = 1, **parameters: Any
) -> Objective:
    """An objective round a tiny backbone, with a rate at which a few steps change the losses visibly."""
    parameters = REQUIRED.get(kind, {}) | parameters
    with_reference = kind(**parameters).needs.reference
    model: dict[str, Any] = {"moved": moved, "dropout": dropout, "key_value_heads": key_value_heads}
    backbone = tiny_backbone(with_reference=with_reference, **model)
    return kind(backbone, optim=AdamW(lr=3e-3, warmup=0, schedule="constant"), **parameters)


def batch_of(kind: Any, rows: Sequence[Row], **options: Any) -> Batch:
    """The rows collated as the objective asks for."""
    kind = described(kind)
    return collate(rows, mismatched=kind.needs.mismatched, whole=kind.needs.last_hidden, **options)


def rows_for(kind: type[Objective], count: int, *, seed: int = 0, labels: Sequence[bool] | None = None) -> list[Row]:
    """Ragged rows as the objective's view has them, with alternating labels unless given; three share a prompt where
    the objective compares the completions of one."""
    rng, kind = random.Random(seed), described(kind)

    def text(longest: int) -> tuple[int, ...]:
        return tuple(rng.randrange(tiny.VOCABULARY) for _ in range(rng.randint(1, longest)))

    rows = []
    for number in range(count):
        prompt, branches = text(6), (text(9), text(5))
        label = labels[number] if labels else number % 3 != 1
        rows.append(
            Row(
                id=f"example-{number}",
                group=number // 3 if kind.needs.grouped else number,
                prompt=prompt,
                branches=branches if kind.view == "pairs" or kind.needs.mismatched else branches[:1],
                desirable=label if kind.view in ("binary", "scored") else None,
                score=(0.5 + rng.random()) * (1 if label else -1) if kind.view == "scored" else None,
            )
        )
    return rows


class InOrder(pl.LightningDataModule):
    """The rows as they come: each stretch of batch_size × accumulate × ranks is a step, divided over micro-batches,
    and these over ranks."""

    def __init__(
        self,
        rows: list[Row],
        *,
        batch_size: int,
        mismatched: bool = False,
        whole: bool = False,
        val: Sequence[Row] = (),
        label_counts: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        self.whole = whole
        self.rows, self.val, self.batch_size, self.mismatched = rows, list(val), batch_size, mismatched
        self.label_counts = label_counts

    def train_dataloader(self) -> DataLoader[Batch]:
        n, (rank, ranks) = self.batch_size, data_ranks(self.trainer)
        per_step = n * ranks * self.trainer.accumulate_grad_batches
        order = []
        for start in range(0, len(self.rows), per_step):
            step = tuple(range(start, start + per_step))
            order += [MicroBatch(step[i : i + n], step) for i in range(rank * n, per_step, n * ranks)]
        return self._loader(self.rows, order)

    def val_dataloader(self) -> DataLoader[Batch] | list[Any]:
        if not self.val:
            return []
        rank, ranks = data_ranks(self.trainer)
        return self._loader(
            self.val, validation_order(len(self.val), batch_size=self.batch_size, world_size=ranks, rank=rank)
        )

    def _loader(self, rows: list[Row], order: list[MicroBatch]) -> DataLoader[Batch]:
        batches = Batches(rows, mismatched=self.mismatched, chunks=2, whole=self.whole)
        return DataLoader(batches, sampler=order, batch_size=None)


@dataclass
class Run:
    """What a training run left behind: train metrics and averaged gradients of each step, and the end."""

    steps: list[dict[str, float]] = field(default_factory=list)
    gradients: list[dict[str, Tensor]] = field(default_factory=list)
    val: dict[str, float] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)

    @property
    def losses(self) -> list[float]:
        return [metrics["train/loss"] for metrics in self.steps]


class Recorder(Callback):
    def __init__(self) -> None:
        self.run = Run()

    def on_before_optimizer_step(self, trainer: pl.Trainer, module: pl.LightningModule, optimizer: Any) -> None:
        gradients = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
        self.run.gradients.append(gradients)

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *_: Any) -> None:
        if trainer.global_step > len(self.run.steps):
            metrics = trainer.callback_metrics
            self.run.steps.append({name: float(metrics[name]) for name in metrics if name.startswith("train/")})


def trainer_for(*callbacks: Callback, ranks: int = 1, **options: Any) -> pl.Trainer:
    return pl.Trainer(
        **{
            "accelerator": "cpu",
            "devices": ranks,
            "strategy": "ddp" if ranks > 1 else "auto",
            "precision": "64-true",
            "max_epochs": 1,
            "callbacks": list(callbacks),
            "use_distributed_sampler": False,
            "num_sanity_val_steps": 0,
            "log_every_n_steps": 1,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
        }
        | options
    )


def fit(
    objective: Objective,
    rows: list[Row],
    *,
    batch_size: int,
    val: Sequence[Row] = (),
    label_counts: tuple[int, int] | None = None,
    **options: Any,
) -> Run:
    """Train for one pass over the rows, in float64 unless told otherwise."""
    recorder = Recorder()
    asked = {"mismatched": objective.needs.mismatched, "whole": objective.needs.last_hidden}
    data = InOrder(rows, batch_size=batch_size, val=val, label_counts=label_counts, **asked)
    trainer = trainer_for(recorder, **options)
    trainer.fit(objective, datamodule=data)
    metrics = trainer.callback_metrics
    recorder.run.val = {name: float(metrics[name]) for name in metrics if name.startswith("val/")}
    recorder.run.weights = {name: p.detach().clone() for name, p in objective.named_parameters()}
    return recorder.run


def assert_same(found: Run, expected: Run) -> None:
    """The same gradients and weights but for rounding in float64, and the same metrics as float32 logs them."""
    assert len(found.steps) == len(expected.steps) > 0
    torch.testing.assert_close(found.gradients, expected.gradients, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(found.weights, expected.weights, rtol=1e-7, atol=1e-9)
    for mine, theirs in zip([*found.steps, found.val], [*expected.steps, expected.val], strict=True):
        assert mine.keys() - SPEED == theirs.keys() - SPEED
        for name in mine.keys() - SPEED:
            assert mine[name] == pytest.approx(theirs[name], rel=1e-6, abs=1e-8), name


def evaluate(objective: Objective, batch: Batch) -> Output:
    """The objective's output for a batch, in float64, without a Trainer."""
    objective.configure_model()
    objective.double()
    policy = objective.backbone.logprobs(batch, with_hidden=objective.needs.hidden)
    reference = objective.backbone.reference_logprobs(batch) if objective.needs.reference else None
    return objective.outcome(batch, policy, reference)


def loss_of(output: Output) -> Tensor:
    return torch.stack([term.total / term.step_count for term in output.loss.values()]).sum()


# Step 0


@pytest.mark.parametrize(
    ("kind", "parameters", "labels", "loss"),
    [
        (DPO, {}, None, math.log(2)),
        (DPO, {"beta": 0.7, "label_smoothing": 0.2}, None, math.log(2)),
        (KTO, {}, None, 0.5),
        (KTO, {"desirable_weight": 1.5, "undesirable_weight": 0.5}, [True, False, True, True], 0.5 * 5 / 4),
        (KTO, {"desirable_weight": 1.5}, [True] * 4, 0.75),
        (KTO, {"undesirable_weight": 0.5}, [False] * 4, 0.25),
        (KTO, {"reference_point": "zero"}, None, 0.5),
        (RobustDPO, {"label_smoothing": 0.2}, None, math.log(2)),
        (IPO, {"beta": 0.5}, None, 1.0),
        (APOZero, {}, None, 1.0),
        (APODown, {}, None, 1.0),
        (BCO, {}, None, math.log(2)),
        (GRPO, {}, [True, False, True, False], 0.0),
        (Mix, {}, None, 0.5 + 0.5 * math.log(2)),
    ],
)
@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_at_step_0_the_policy_equals_the_reference(
    kind: type[Objective], parameters: dict[str, float], labels: list[bool] | None, loss: float, precision: str
) -> None:
    rows = rows_for(kind, 4, labels=labels)
    (first,) = fit(objective_of(kind, **parameters), rows, batch_size=4, precision=precision).steps
    assert first["train/loss"] == pytest.approx(loss, abs=1e-6)
    rewards = [name for name in ("train/rewards/chosen", "train/rewards/rejected", "train/kl/raw") if name in first]
    assert rewards
    assert [first[name] for name in rewards] == [0.0] * len(rewards)


# The step is what counts, not how it is divided


@pytest.mark.parametrize("kind", PER_EXAMPLE_OR_TOKEN)
def test_accumulated_micro_batches_equal_one_batch(kind: type[Objective]) -> None:
    rows = rows_for(kind, 18)
    parts = fit(objective_of(kind, moved=0.1), rows, batch_size=2, accumulate_grad_batches=3)
    assert_same(parts, fit(objective_of(kind, moved=0.1), rows, batch_size=6))


def test_accumulated_kto_is_the_mean_over_micro_batches_with_their_own_reference_points() -> None:
    """One of the two micro-batches has only one kind of feedback."""
    rows = rows_for(KTO, 6, labels=[True, True, True, True, False, False])
    whole = fit(objective_of(KTO, moved=0.1), rows, batch_size=3, accumulate_grad_batches=2)
    halves = [fit(objective_of(KTO, moved=0.1), half, batch_size=3) for half in (rows[:3], rows[3:])]
    first, second = (half.steps[0]["train/kl"] for half in halves)
    assert first > 0
    assert second > 0
    assert first != second
    assert whole.steps[0]["train/kl"] == pytest.approx((first + second) / 2, rel=1e-6)
    mean = {name: sum(half.gradients[0][name] for half in halves) / 2 for name in whole.gradients[0]}
    torch.testing.assert_close(whole.gradients[0], mean, rtol=1e-10, atol=1e-12)


def _train(kind: type[Objective], rows: list[Row], **options: Any) -> Run:
    return fit(objective_of(kind, moved=0.1), rows, **options)


@pytest.mark.parametrize(
    ("kind", "accumulate"),
    [
        (SFT, 1),
        (CSFT, 1),
        (KTO, 1),
        (DPO, 1),
        (PPO, 1),
        (BCO, 1),
        (GRPO, 1),
        (BradleyTerry, 1),
        (SFT, 2),
        (KTO, 2),
        (BCO, 2),
        (GRPO, 2),
    ],
)
def test_two_processes_equal_one(kind: type[Objective], accumulate: int) -> None:
    """With ragged rows, an odd number of validation examples, and micro-batches that have one label on a rank."""
    labels = [True, True, False, False, True, False, True, True] * 2
    rows, val = rows_for(kind, 16, labels=labels), rows_for(kind, 11, seed=1)
    train = partial(_train, kind, rows, val=val, accumulate_grad_batches=accumulate)
    one = train(batch_size=4)
    two = run_ranks(partial(train, batch_size=2, ranks=2))
    assert_same(two[0], one)
    assert_same(two[1], one)
    assert max(one.losses) - min(one.losses) > 1e-3
    assert kind is not KTO or all(metrics["train/kl"] > 0 for metrics in one.steps)


def test_objectives_that_couple_a_step_refuse_to_divide_it() -> None:
    with pytest.raises(ValueError, match=r"^trainer\.accumulate_grad_batches: PPO .* expected 1, found 2; raise data"):
        fit(objective_of(PPO), rows_for(PPO, 4), batch_size=2, accumulate_grad_batches=2)


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_the_order_of_examples_changes_nothing(kind: type[Objective]) -> None:
    rows = rows_for(kind, 7)
    mixed = [rows[i] for i in (3, 0, 6, 2, 5, 1, 4)]
    expected, found = (loss_of(evaluate(objective_of(kind, moved=0.1), batch_of(kind, some))) for some in (rows, mixed))
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=0)


@pytest.mark.parametrize("kind", OBJECTIVES)
@pytest.mark.parametrize("chunks", [4, 100])
def test_padding_to_the_longest_or_in_groups_changes_nothing(kind: type[Objective], chunks: int) -> None:
    rows = rows_for(kind, 7)
    expected, found = (
        loss_of(evaluate(objective_of(kind, moved=0.1), batch_of(kind, rows, chunks=parts))) for parts in (1, chunks)
    )
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=0)


@pytest.mark.parametrize("kind", PER_EXAMPLE_OR_TOKEN)
def test_a_long_example_adds_its_own_loss_and_changes_no_other(kind: type[Objective]) -> None:
    rows = rows_for(kind, 4)
    last = rows[-1]
    long = Row("long", 9, tuple(range(1, 20)), (tuple(range(1, 30)),) * len(last.branches), last.desirable, last.score)
    few, alone, both = (
        [term.total.item() for term in evaluate(objective_of(kind, moved=0.1), batch_of(kind, some)).loss.values()]
        for some in (rows, [long], [*rows, long])
    )
    assert both == pytest.approx([a + b for a, b in zip(few, alone, strict=True)], rel=1e-12, abs=1e-13)


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_empty_columns_of_tokens_change_nothing(kind: type[Objective]) -> None:
    batch = batch_of(kind, rows_for(kind, 5))
    objective = objective_of(kind, moved=0.1)
    expected = loss_of(evaluate(objective, batch))
    policy = objective.backbone.logprobs(batch, with_hidden=objective.needs.hidden)
    reference = objective.backbone.reference_logprobs(batch) if objective.needs.reference else None

    def wider(logprobs: LogProbs | None) -> LogProbs | None:
        if logprobs is None:
            return None
        hidden = None if logprobs.hidden is None else pad(logprobs.hidden, (0, 0, 0, 3), value=5.0)
        return LogProbs(pad(logprobs.tokens, (0, 3)), pad(logprobs.mask, (0, 3)), hidden, logprobs.last)

    batch.mask = pad(batch.mask, (0, 3))
    found = loss_of(objective.compute(batch, wider(policy), wider(reference)))
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=0)


# Metrics

BINARY = {"rewards/chosen", "rewards/rejected", "rewards/margins", "kl/policy_reference"}
LOGPS = {"logps/chosen", "logps/rejected"}
PAIRS = BINARY - {"kl/policy_reference"} | {"rewards/accuracies"}


@pytest.mark.parametrize(
    ("kind", "names", "val_only"),
    [
        (SFT, {"logps/chosen"}, set()),
        (CSFT, LOGPS, set()),
        (KTO, BINARY | LOGPS | {"kl", "kl/raw"}, {"rewards/auc"}),
        (DPO, BINARY | LOGPS | {"rewards/accuracies"}, set()),
        (PPO, BINARY | LOGPS | {"loss/policy", "loss/critic", "loss/kl"}, {"rewards/auc"}),
        (BCO, BINARY | LOGPS | {"delta"}, {"rewards/auc"}),
        (GRPO, BINARY | LOGPS | {"loss/policy", "loss/kl", "groups/incomplete"}, {"rewards/auc"}),
        (BradleyTerry, PAIRS | LOGPS, set()),
        (Mix, BINARY | LOGPS | {"loss/kto", "loss/bco", "kto/kl", "kto/kl/raw", "bco/delta"}, {"rewards/auc"}),
    ],
)
def test_the_names_of_metrics(kind: type[Objective], names: set[str], val_only: set[str]) -> None:
    run = fit(objective_of(kind), rows_for(kind, 4), batch_size=4, val=rows_for(kind, 4))
    of_step = {"grad_norm", "lr", "examples_per_second", "tokens_per_second"}
    assert run.steps[0].keys() == {f"train/{name}" for name in names | of_step | {"loss"}}
    assert run.val.keys() == {f"val/{name}" for name in names | val_only | {"loss"}}


@pytest.mark.parametrize("kind", [kind for kind in WITH_REFERENCE if kind not in (IPO, Mix)])
def test_validation_metrics_by_hand(kind: type[Objective]) -> None:
    """Each row alone through policy and reference after the last of several validations, put together in Python."""
    objective, val = objective_of(kind, beta=0.25), rows_for(kind, 11, seed=1)
    run = fit(objective, rows_for(kind, 12), batch_size=4, val=val, val_check_interval=1)
    chosen, rejected, log_ratios = [], [], []
    logps: dict[str, list[float]] = {"chosen": [], "rejected": []}
    for row in val:
        batch = collate([row], mismatched=kind.needs.mismatched)
        sums = objective.backbone.logprobs(batch).sum[0].tolist()
        references = objective.backbone.reference_logprobs(batch).sum[0].tolist()
        for branch, liked in enumerate((True, False) if kind.view == "pairs" else (row.desirable,)):
            log_ratios.append(sums[branch] - references[branch])
            (chosen if liked else rejected).append(0.25 * log_ratios[-1])
            logps["chosen" if liked else "rejected"].append(sums[branch])

    def mean(values: list[float]) -> float:
        return math.fsum(values) / len(values)

    def wins(pairs: list[tuple[float, float]]) -> float:
        return mean([(a > b) + 0.5 * (a == b) for a, b in pairs])

    expected = {
        "rewards/chosen": mean(chosen),
        "rewards/rejected": mean(rejected),
        "rewards/margins": mean(chosen) - mean(rejected),
        "logps/chosen": mean(logps["chosen"]),
        "logps/rejected": mean(logps["rejected"]),
        "kl/policy_reference": mean(log_ratios),
    }
    if kind.view == "pairs":
        expected["rewards/accuracies"] = wins(list(zip(chosen, rejected, strict=True)))
    else:
        expected["rewards/auc"] = wins([(a, b) for a in chosen for b in rejected])
    assert {name: run.val[f"val/{name}"] for name in expected} == pytest.approx(expected, rel=1e-5, abs=1e-7)
    assert abs(expected["rewards/margins"]) > 1e-3


def test_a_tie_counts_half() -> None:
    """At step 0 all rewards are equal."""
    pairs = fit(objective_of(DPO), rows_for(DPO, 4), batch_size=4)
    assert pairs.steps[0]["train/rewards/accuracies"] == 0.5
    still = KTO(tiny_backbone(), optim=AdamW(lr=0))
    assert fit(still, rows_for(KTO, 4), batch_size=4, val=rows_for(KTO, 5)).val["val/rewards/auc"] == 0.5


def test_a_side_without_examples_has_no_metrics() -> None:
    (first,) = fit(objective_of(KTO), rows_for(KTO, 2, labels=[False, False]), batch_size=2).steps
    assert "train/rewards/rejected" in first
    assert not first.keys() & {"train/rewards/chosen", "train/logps/chosen", "train/rewards/margins"}


def test_each_step_counts_anew() -> None:
    one, other = rows_for(SFT, 2), rows_for(SFT, 2, seed=1)
    still = SFT(tiny_backbone(with_reference=False), optim=AdamW(lr=0))
    first, second, third = fit(still, one + other + one, batch_size=2).losses
    assert first == third != second


def test_each_validation_counts_anew() -> None:
    objective, val = objective_of(SFT), rows_for(SFT, 4, seed=1)
    run = fit(objective, rows_for(SFT, 6), batch_size=2, val=val, val_check_interval=1)
    assert run.val["val/loss"] == pytest.approx(loss_of(evaluate(objective, collate(val))).item(), rel=1e-6)


def test_the_terms_of_a_loss_add_up() -> None:
    metrics = fit(objective_of(PPO), rows_for(PPO, 8), batch_size=4).steps[1]
    terms = [metrics[f"train/loss/{name}"] for name in ("policy", "critic", "kl")]
    assert all(terms)
    assert metrics["train/loss"] == pytest.approx(sum(terms), rel=1e-6)


def test_the_logged_gradient_norm_is_that_before_clipping() -> None:
    run = fit(objective_of(PPO), rows_for(PPO, 4), batch_size=4, gradient_clip_val=1e-3)
    (metrics,), (gradients,) = run.steps, run.gradients
    norm = math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients.values()))
    assert metrics["train/grad_norm"] == pytest.approx(norm, rel=1e-6)
    assert norm > 0.1


def test_the_logged_rate_is_the_one_the_step_used() -> None:
    optim = AdamW(lr=1e-3, warmup=2, schedule="linear")
    run = fit(SFT(tiny_backbone(with_reference=False), optim=optim), rows_for(SFT, 8), batch_size=2)
    rates = [metrics["train/lr"] for metrics in run.steps]
    assert rates == pytest.approx([1e-3 / 3, 2e-3 / 3, 1e-3, 0.5e-3], rel=1e-6)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_speed_counts_every_example_and_token_of_a_step(accumulate: int) -> None:
    rows = rows_for(DPO, 8)
    run = fit(objective_of(DPO), rows, batch_size=4 // accumulate, accumulate_grad_batches=accumulate)
    for start, metrics in zip((0, 4), run.steps, strict=True):
        tokens = sum(len(row.prompt) + len(branch) for row in rows[start : start + 4] for branch in row.branches)
        ratio = metrics["train/tokens_per_second"] / metrics["train/examples_per_second"]
        assert ratio == pytest.approx(tokens / 4, rel=1e-6)
        assert metrics["train/examples_per_second"] > 0


def test_a_clock_too_coarse_for_a_step_gives_no_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("halos.loop.steps.time.perf_counter", lambda: 12.0)
    (metrics,) = fit(objective_of(DPO), rows_for(DPO, 4), batch_size=4).steps
    assert not SPEED & metrics.keys()


def test_loggers_get_the_metrics_of_every_nth_step() -> None:
    class Lines(DummyLogger):
        seen: ClassVar[list[tuple[int, float]]] = []

        def log_metrics(self, metrics: dict[str, float], step: int) -> None:
            self.seen += [(step, metrics[name]) for name in metrics if name == "train/loss"]

    each = fit(objective_of(SFT), rows_for(SFT, 10), batch_size=2)
    fit(objective_of(SFT), rows_for(SFT, 10), batch_size=2, logger=Lines(), log_every_n_steps=2)
    assert Lines.seen == [(step, pytest.approx(each.losses[step - 1], rel=1e-6)) for step in (2, 4)]


@pytest.mark.parametrize(("every", "reads"), [(1, [1, 1, 1, 1, 1]), (2, [2, 2, 1]), (50, [5])])
def test_metrics_are_read_when_a_step_is_logged_and_at_the_end(
    every: int, reads: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []  # the steps of each reading
    read, objective = Steps.read, objective_of(KTO)

    def counted(steps: Steps, ranks: int) -> list[tuple[Step, dict[str, float]]]:
        found = read(steps, ranks)
        seen.append(len(found))
        return found

    monkeypatch.setattr(Steps, "read", counted)
    rows = rows_for(KTO, 20, labels=[True, False] * 10)
    run = fit(objective, rows, batch_size=2, accumulate_grad_batches=2, log_every_n_steps=every)
    assert seen == reads
    losses = objective.take_losses()
    assert len(losses) == 5
    assert objective.take_losses() == []
    expected = fit(objective_of(KTO), rows, batch_size=2, accumulate_grad_batches=2)
    assert losses == pytest.approx(expected.losses, rel=1e-6)
    torch.testing.assert_close(run.weights, expected.weights, rtol=1e-9, atol=1e-12)


class GradientsBeforeEachBatch(Callback):
    def __init__(self) -> None:
        self.seen: list[bool] = []

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, *_: Any) -> None:
        self.seen.append(any(p.grad is not None for p in module.parameters()))


def test_no_gradient_takes_memory_beside_the_next_steps_activations() -> None:
    before = GradientsBeforeEachBatch()
    data = InOrder(rows_for(SFT, 8), batch_size=2, mismatched=False)
    trainer_for(before, accumulate_grad_batches=2).fit(objective_of(SFT), datamodule=data)
    assert before.seen == [False, True, False, True]  # within a step they are added up


# Non-finite losses


class Broken(SFT):
    """SFT whose loss, or only its gradient, is not finite for one example."""

    def __init__(self, *args: Any, loss: bool, **base: Any) -> None:
        super().__init__(*args, **base)
        self.breaks_loss = loss

    def compute(self, batch: Batch, policy: LogProbs, reference: None) -> Output:
        output = super().compute(batch, policy, reference)
        if "example-9" in batch.ids:
            term = output.loss["sft"]
            # √0 has an infinite slope.
            term.total = term.total + ((term.total - term.total.detach()).sqrt() if not self.breaks_loss else math.nan)
        return output


class WeightsOfEachStep(Callback):
    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, *_: Any) -> None:
        self.seen.append(torch.cat([p.detach().flatten() for p in module.parameters()]))


def _broken_run(loss: bool, ranks: int, accumulate: int) -> tuple[str, bool, bool]:
    # The error, whether the step before it changed the weights, and whether it did.
    objective, before = objective_of(Broken, loss=loss), WeightsOfEachStep()
    data = InOrder(rows_for(SFT, 12), batch_size=4 // (ranks * accumulate), mismatched=False)
    trainer = trainer_for(before, ranks=ranks, accumulate_grad_batches=accumulate)
    with pytest.raises(FloatingPointError) as error:
        trainer.fit(objective, datamodule=data)
    before.on_train_batch_start(trainer, objective)
    return (
        str(error.value),
        not torch.equal(before.seen[0], before.seen[accumulate]),
        not torch.equal(before.seen[2 * accumulate], before.seen[-1]),
    )


@pytest.mark.parametrize("loss", [True, False], ids=["loss", "gradient"])
@pytest.mark.parametrize(("ranks", "accumulate"), [(1, 1), (1, 2), (2, 1)])
def test_a_non_finite_step_stops_with_its_examples_and_leaves_the_weights(
    loss: bool, ranks: int, accumulate: int
) -> None:
    run = partial(_broken_run, loss, ranks, accumulate)
    results = run_ranks(run) if ranks > 1 else [run()]
    for message, moved, spoilt in results:
        what = "loss" if loss else "grad_norm"
        assert message.startswith(f"{what} is nan at step 3;") or message.startswith(f"{what} is inf at step 3;")
        assert message.endswith("Examples of this step: example-8, example-9, example-10, example-11")
        assert moved
        assert not spoilt


@pytest.mark.parametrize("loss", [True, False], ids=["loss", "gradient"])
def test_a_non_finite_step_that_was_not_logged_is_found_later(loss: bool) -> None:
    objective = objective_of(Broken, loss=loss)
    with pytest.raises(FloatingPointError) as error:
        fit(objective, rows_for(SFT, 20), batch_size=4, log_every_n_steps=4)
    assert re.match(r"(loss|grad_norm) is (nan|inf) at step 3; the weights are spoilt", str(error.value))
    assert str(error.value).endswith("Examples of this step: example-8, example-9, example-10, example-11")
    assert objective.trainer.global_step == 3  # of step 4 the metrics were to be logged


def test_a_non_finite_step_is_found_at_the_end_if_none_is_logged() -> None:
    with pytest.raises(FloatingPointError, match=r"loss is nan at step 3; "):
        fit(objective_of(Broken, loss=True), rows_for(SFT, 12), batch_size=4, log_every_n_steps=50)


def test_a_non_finite_validation_names_its_examples() -> None:
    rows = rows_for(SFT, 12)
    with pytest.raises(FloatingPointError) as error:
        fit(objective_of(Broken, loss=True), rows[:4], val=rows, batch_size=4)
    assert str(error.value) == (
        "the validation loss is nan after step 1; the last good checkpoint is kept. "
        "Examples: example-8, example-9, example-10, example-11"
    )


def test_a_term_without_the_steps_count_is_refused() -> None:
    class Uncounted(SFT):
        def compute(self, batch: Batch, policy: LogProbs, reference: None) -> Output:
            return Output({"mine": Mean(-policy.tokens.sum(), batch.mask.sum())})

    with pytest.raises(ValueError, match="'mine' of Uncounted: expected the count of the whole step, found none"):
        fit(objective_of(Uncounted), rows_for(SFT, 4), batch_size=4)


# What is trained and what is saved


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_the_reference_and_the_metrics_are_in_no_checkpoint_and_no_optimizer(kind: type[Objective]) -> None:
    objective = objective_of(kind)
    fit(objective, rows_for(kind, 4), batch_size=4, val=rows_for(kind, 4))
    policy = {f"backbone.policy.{name}" for name in objective.backbone.policy.state_dict()}
    own = {
        PPO: {"value_head.linear.weight", "value_head.linear.bias"},
        BCO: {"shift.means", "shift.counts"},
        BradleyTerry: {"reward_head.linear.weight"},
        Mix: {"parts.bco.shift.means", "parts.bco.shift.counts"},
    }
    assert objective.state_dict().keys() == policy | own.get(kind, set())
    (group,) = objective.configure_optimizers()["optimizer"].param_groups
    trained = {name: id(p) for name, p in objective.named_parameters() if p.requires_grad}
    assert {id(p) for p in group["params"]} == set(trained.values())
    assert len(group["params"]) == len(trained)
    frozen = {"backbone.policy.lm_head.weight"} if kind is BradleyTerry else set()
    assert dict(objective.named_parameters()).keys() - trained == frozen


@pytest.mark.parametrize("kind", WITH_REFERENCE)
def test_the_reference_stays_and_the_policy_moves(kind: type[Objective]) -> None:
    objective, start = objective_of(kind), tiny_backbone().policy.double().state_dict()
    fit(objective, rows_for(kind, 8), batch_size=4)
    torch.testing.assert_close(dict(objective.backbone.reference.state_dict()), dict(start), rtol=0, atol=0)
    moved = [not torch.equal(weight, start[name]) for name, weight in objective.backbone.policy.state_dict().items()]
    assert all(moved)


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_only_some_objectives_need_a_reference(kind: type[Objective]) -> None:
    objective = kind(partial(tiny_backbone, with_reference=False), **REQUIRED.get(kind, {}))
    if kind in WITH_REFERENCE:
        with pytest.raises(ValueError, match="expected a backbone with a reference"):
            fit(objective, rows_for(kind, 2), batch_size=2)
    else:
        fit(objective, rows_for(kind, 2), batch_size=2)
        assert objective.backbone.reference is None


def test_frozen_parameters_stay_out_of_the_optimizer() -> None:
    backbone = tiny_backbone(with_reference=False)
    backbone.policy.model.embed_tokens.requires_grad_(False)
    objective = SFT(backbone, optim=AdamW(lr=1e-2))
    run = fit(objective, rows_for(SFT, 4), batch_size=4)
    start = tiny_backbone().policy.double()
    assert torch.equal(run.weights["backbone.policy.model.embed_tokens.weight"], start.model.embed_tokens.weight)
    assert not torch.equal(run.weights["backbone.policy.lm_head.weight"], start.lm_head.weight)
    (group,) = objective.configure_optimizers()["optimizer"].param_groups
    assert all(p.requires_grad for p in group["params"])


def test_the_critic_alone_does_not_move_the_policy() -> None:
    objective = objective_of(PPO, moved=0.1)
    batch = collate(rows_for(PPO, 4))
    output = evaluate(objective, batch)
    output.loss["critic"].total.backward()
    assert all(p.grad is None for p in objective.backbone.parameters())
    assert all(p.grad is not None and p.grad.any() for p in objective.value_head.parameters())


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_models_are_made_on_the_cpu_whatever_lightnings_default_device(device: str) -> None:
    seen: list[torch.device] = []

    def make() -> Backbone:
        seen.append(torch.empty(0).device)
        return Backbone(tiny.model(), with_reference=False)

    objective = PPO(make)
    with torch.device(device):  # as Lightning's strategies call it, with the device that they train on
        objective.configure_model()
    assert seen == [torch.device("cpu")]
    assert {p.device.type for p in objective.parameters()} == {"cpu"}


@pytest.mark.parametrize("policy_clip", [None, 0.25])
def test_the_critic_is_clipped_apart_from_the_policy(policy_clip: float | None) -> None:
    objective = objective_of(PPO, critic_clip=2.0)
    objective.configure_model()
    for parameter in objective.parameters():
        parameter.grad = torch.ones_like(parameter)

    def norm(module: torch.nn.Module) -> float:
        return math.sqrt(sum(float(p.grad.square().sum()) for p in module.parameters()))

    for parameter in objective.value_head.parameters():
        parameter.grad *= 100
    before = norm(objective.backbone)
    objective.configure_gradient_clipping(None, policy_clip, None)
    assert norm(objective.value_head) == pytest.approx(2.0, rel=1e-5)
    assert norm(objective.backbone) == pytest.approx(policy_clip or before, rel=1e-5)


def test_clipping_each_value_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^trainer\.gradient_clip_algorithm: expected norm, found .*VALUE; "):
        fit(
            objective_of(SFT),
            rows_for(SFT, 4),
            batch_size=4,
            gradient_clip_val=1.0,
            gradient_clip_algorithm="value",
        )


def test_clipping_bounds_the_step() -> None:
    """AdamW hides the size of gradients, except of ones far below its ε."""
    optim = AdamW(lr=1.0, eps=1e3, warmup=0, schedule="constant")
    rows, start = rows_for(SFT, 4), tiny_backbone().policy.double()
    objective = SFT(tiny_backbone(with_reference=False), optim=optim)
    run = fit(objective, rows, batch_size=4, gradient_clip_val=0.01)
    moved = [run.weights[f"backbone.policy.{name}"] - p for name, p in start.named_parameters()]
    assert float(torch.nn.utils.get_total_norm(moved)) == pytest.approx(0.01 / 1e3, rel=1e-3)


# What an objective learns before and during training


def test_labels_are_counted_before_the_first_step() -> None:
    objective = objective_of(KTO, desirable_weight="auto", undesirable_weight="auto")
    rows = rows_for(KTO, 4, labels=[True, False, False, False])
    run = fit(objective, rows, batch_size=4, label_counts=(100, 300))
    assert run.losses[0] == pytest.approx(0.5 * (3 + 1 + 1 + 1) / 4, abs=1e-6)


def test_dropout_depends_on_the_seed_and_on_nothing_before() -> None:
    rows = rows_for(SFT, 8)

    def losses(seed: int, before: int) -> list[float]:
        torch.manual_seed(before)
        return fit(objective_of(SFT, dropout=0.5, seed=seed), rows, batch_size=4).losses

    assert losses(0, before=1) == losses(0, before=2)
    assert losses(0, before=1) != losses(1, before=1)


def test_losses_of_another_shape_are_refused() -> None:
    objective, batch = SFT(), collate(rows_for(SFT, 4))
    with pytest.raises(ValueError, match=r"expected one loss per example, shape \(4,\), found \(4, 1\)"):
        objective.per_example(torch.zeros(4, 1), batch)
    width = batch.mask.shape[2]
    with pytest.raises(ValueError, match=rf"expected one loss per token, shape \(4, {width}\), found \(4,\)"):
        objective.per_token(torch.zeros(4), batch)


def test_means_over_tokens_leave_the_others_out() -> None:
    rows = [Row("a", 0, (1,), ((5,), (2, 3))), Row("b", 1, (1,), ((4, 5, 6), (7,)))]
    batch, objective = collate(rows), SFT()
    losses = torch.tensor([[1.0, 20.0, 300.0], [4000.0, 50000.0, 600000.0]])
    term = objective.per_token(losses, batch, branch=1)
    assert (float(term.total), float(term.count), term.step_count) == (4021.0, 3.0, 3)


# An objective from outside


class Hinge(Objective):
    """Rank chosen above rejected by a margin of 1."""

    view = "pairs"
    needs = Needs(reference=False)

    def compute(self, batch: Batch, policy: LogProbs, reference: None) -> Output:
        chosen, rejected = (policy.sum / policy.count).unbind(1)
        gap = Mean((chosen - rejected).detach().sum(), len(batch))
        return Output({"hinge": self.per_example((1 - chosen + rejected).relu(), batch)}, metrics={"gap": gap})


def test_an_objective_from_outside_needs_only_its_mathematics() -> None:
    rows = rows_for(Hinge, 4) * 6
    run = fit(objective_of(Hinge), rows, batch_size=4, val=rows[:4])
    assert run.losses[-1] < run.losses[0]
    assert run.val["val/gap"] > run.steps[0]["train/gap"]
    parts = fit(objective_of(Hinge), rows, batch_size=2, accumulate_grad_batches=2, val=rows[:4])
    assert_same(parts, run)


def test_a_backbone_is_needed_before_a_step() -> None:
    with pytest.raises(ValueError, match="the objective has no backbone yet"):
        SFT().configure_gradient_clipping(None, 1.0, None)
