"""An objective from outside needs only its mathematics."""

from __future__ import annotations

from halos.data.batches.batch import Batch
from halos.metrics import Mean
from halos.objectives import (
    Needs,
    Objective,
    Output,
)
from halos.policy.logprobs.completions import LogProbs
from tests.loop_runs import assert_same, fit, objective_of, rows_for


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
