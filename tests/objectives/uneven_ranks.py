"""Two ranks with unequal numbers of examples against one with all of them."""

from collections.abc import Sequence
from functools import partial

import pytest
import torch

from halos.data.batches.collate import step_size
from halos.data.rows.token_rows import Row
from halos.objectives import Objective
from halos.testing.examples import evaluate, make_inputs
from halos.testing.ranks import on_ranks


def assert_ranks_equal_one(objective: Objective, rows: Sequence[Row], *, cut: int) -> None:
    """Loss and gradients of the first ``cut`` rows on one rank and the others on another are those of all on one."""
    step = step_size(rows)
    whole = evaluate(objective, make_inputs(objective, rows, step=step))
    inputs = [make_inputs(objective, part, step=step) for part in (rows[:cut], rows[cut:])]
    parts = on_ranks([partial(evaluate, objective, each) for each in inputs])
    assert float(sum(part.loss for part in parts)) == pytest.approx(float(whole.loss), rel=1e-12)
    for part in parts:
        for name, gradient in part.gradients.items():
            branches, width = gradient.shape
            torch.testing.assert_close(gradient, whole.gradients[name][:branches, :width], rtol=1e-12, atol=1e-15)
