"""Warnings of data that a loss accepts but learns little from, given before training by the first process."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import cast

import numpy as np

from halos.checks import is_number
from halos.data.preparation.hygiene import Finding
from halos.data.records.adapted import SHOWN_PLACES
from halos.data.rows.token_rows import Row, TokenRows
from halos.processes.first import first_process_only

log = logging.getLogger(__name__)

IMBALANCE = 4.0
"""How often the weight of one class may be that of the other. The KTO paper recommends ratios from 1 to 4/3."""
NAMED = 3
"""Places that a warning names."""


def equal_pairs(split: str, table: TokenRows) -> Finding:
    """Find, and warn of, the pairs of a split whose two completions have the same token ids."""
    equal, max_length = table.equal_pairs(), table.limits.max_length
    finding = Finding(len(equal), table.ids(equal[:SHOWN_PLACES]))
    at_limit = int(((table.prompt_sizes + table.sizes()[0])[equal] == max_length).sum()) if len(equal) else 0
    _warn_of_equal_pairs(f"{len(table):,} pairs of {split}", finding, at_limit, max_length)
    return finding


def warn_of_equal_pairs(name: str, rows: Sequence[Row], max_length: int) -> None:
    """Warn of the pairs among some rows of pairs whose two completions have the same token ids."""
    equal = [row for row in rows if row.branches[0] == row.branches[1]]
    at_limit = sum(len(row.prompt) + len(row.branches[0]) == max_length for row in equal)
    _warn_of_equal_pairs(name, Finding(len(equal), [row.id for row in equal[:SHOWN_PLACES]]), at_limit, max_length)


@first_process_only
def _warn_of_equal_pairs(name: str, finding: Finding, at_limit: int, max_length: int) -> None:
    if not finding.count:
        return
    places = ", ".join(finding.ids[:NAMED]) + (", …" if finding.count > NAMED else "")
    help_ = f"; {at_limit:,} of them end at data.max_length={max_length}: raise it" if at_limit else ""
    log.warning(
        "data: %s of %s have the same tokens on both sides (%s), so no preference is learned from them%s",
        f"{finding.count:,}",
        name,
        places,
        help_,
    )


@first_process_only
def warn_of_one_class(name: str, labels: np.ndarray) -> None:
    """Warn of completions that are all desirable, or all undesirable.

    Args:
        name: how many completions these are, and which.
        labels: [n] whether each is desirable.
    """
    if not len(labels) or (labels.any() and not labels.all()):
        return
    if labels.all():
        kind, help_ = "desirable and none is undesirable", "add undesirable ones, or imitate these with loss=sft"
    else:
        kind, help_ = "undesirable and none is desirable", "add desirable ones, or it learns only what not to write"
    log.warning("data: all %s are %s, but this loss learns from their difference; %s", name, kind, help_)


@first_process_only
def warn_of_imbalance(loss: Mapping[str, object], counts: tuple[float, float] | None) -> None:
    """Warn of a class that outweighs the other by more than :data:`IMBALANCE`.

    Args:
        loss: the parameters of the loss; of those without ``desirable_weight`` nothing is said.
        counts: of desirable and undesirable training completions, by weight.
    """
    weights = (loss.get("desirable_weight"), loss.get("undesirable_weight"))
    if counts is None or not all(counts) or not all(is_number(weight) for weight in weights):
        return
    desirable, undesirable = (cast("float", weight) * count for weight, count in zip(weights, counts, strict=True))
    if max(desirable, undesirable) > IMBALANCE * min(desirable, undesirable) > 0:
        key = "desirable_weight" if desirable < undesirable else "undesirable_weight"
        counts_text = f"{counts[0]:,g} desirable and {counts[1]:,g} undesirable training completions"
        log.warning("data: %s: loss.%s=auto balances their weights", counts_text, key)
