"""The page of the family says what the code says, and what follows from the formulas by hand."""

from __future__ import annotations

import math
from functools import cache

import pytest

from scripts.pages.family import TERMS, entry, family, family_page
from scripts.write_docs import FAMILY

# Of each loss: data, reference model, reference point, HALO; value in gains, in losses, loss aversion, bound.
BY_HAND = {
    # λ σ(βu), whose slope is largest at 0, where it is β/4
    "kto": ("labels yes the mean of mismatched replies, at least 0", "yes", "concave convex neutral β/4"),
    "kto_zero": ("labels yes 0", "yes", "concave convex neutral β/4"),
    "kto_reference_free": ("labels no the mean of mismatched replies", "no", "concave convex neutral β/4"),
    # log σ(βu) has the slope β σ(−βu)
    "dpo": ("pairs yes the rejected reply", "yes", "concave concave averse β"),
    "halo_kto_risk_neutral": (
        "labels yes the mean of mismatched replies, at least 0", "yes", "linear linear neutral 0.1",
    ),
    # −(u − 1/(2β))² rises up to 1/(2β), and its slope has no bound
    "ipo": ("pairs yes the rejected reply", "no", "concave concave averse none"),
    "hinge": ("pairs yes the rejected reply", "yes", "concave linear averse β"),
    "simpo": ("pairs no the rejected reply", "no", "concave concave averse β"),
    # (1 − ε)/(1 − 2ε) β and (1 − ε) β for ε = 0.1
    "robust_dpo": ("pairs yes the rejected reply", "yes", "concave concave averse 9β/8"),
    "cdpo": ("pairs yes the rejected reply", "no", "concave concave averse 0.9β"),
    "orpo": ("pairs no none", "no", "concave concave averse none"),
    "sft": ("demonstrations no none", "no", "linear linear neutral 1"),
}  # fmt: skip


@cache
def rows() -> dict[str, list[str]]:
    """The cells of the page's three tables, by the loss in the first one."""
    found: dict[str, list[str]] = {}
    for line in FAMILY.read_text(encoding="utf-8").splitlines():
        if line.startswith("| [`"):
            first, *cells = [cell.strip() for cell in line.strip("|").split(" | ")]
            name, _, terms = first.partition("](")
            found.setdefault(name.strip("[`") + terms.partition("), ")[2], []).extend(cells)
    return found


@pytest.mark.parametrize("name", BY_HAND)
def test_the_page_says_what_follows_from_the_formula(name: str) -> None:
    needs, halo, shape = BY_HAND[name]
    cells = rows()[name]
    assert " ".join(cells[:3]) == needs
    assert cells[3].partition(",")[0] == halo
    assert " ".join(cells[4:8]) == shape
    assert (len(cells) > 8) == (halo == "no")  # why it is none


def test_reasons_name_the_gain_that_follows_from_the_formula() -> None:
    # The minimum of cDPO's loss is at log((1 − ε)/ε)/β, that of IPO's at 1/(2β); the grid's points are 0.25
    # apart, and the loss still falls at the one that is nearest.
    for name, peak in (("cdpo", math.log(9) / 0.1), ("ipo", 5.0)):
        first = 0.25 * (round(peak / 0.25) + 1)
        assert rows()[name][8] == f"desirable completions: the value decreases at a gain of {first:.3g}"


def test_every_loss_has_its_row() -> None:
    more = {f"{name}{' and '.join(terms)} term alone" for name, terms in TERMS.items()}
    assert set(rows()) == {*family(), *more}


@pytest.mark.long
@pytest.mark.parametrize("name", ["kto", "dpo", "simpo", "ipo"])
@pytest.mark.slow
def test_rows_are_what_the_code_says(name: str) -> None:
    found = entry(name)
    assert rows()[name] == [*found.needs, *found.shape, *(["; ".join(found.failures)] if found.failures else [])]


@pytest.mark.slow
def test_the_page_is_up_to_date() -> None:
    assert FAMILY.read_text(encoding="utf-8") == family_page(), "run python scripts/write_docs.py"
