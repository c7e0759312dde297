"""The conformance kit checks that an objective keeps the promises that make comparisons fair.

``check_objective(MyLoss)`` in a test, or ``pytest --halos-objective mylab.losses.MyLoss`` from a shell.
"""

from collections.abc import Sequence

from halos.data.rows.token_rows import Row
from halos.testing import properties as _registered  # noqa: F401
from halos.testing.examples import Make, make_objective
from halos.testing.promises import BATCHES, PROPERTIES, NotApplicable, Violation

__all__ = ["PROPERTIES", "NotApplicable", "Violation", "check_objective", "check_property"]


def check_objective(make: Make) -> None:
    """Check every property of :data:`PROPERTIES` that applies to an objective.

    Args:
        make: the objective's class, or a ``functools.partial`` of it with parameters.

    Raises:
        Violation: naming the first property that is broken, what was expected and found, and the smallest batch that
            shows it.
    """
    for name in PROPERTIES:
        try:
            check_property(make, name)
        except NotApplicable:
            continue


def check_property(make: Make, name: str) -> None:
    """Check one property of an objective.

    Args:
        make: see :func:`check_objective`.
        name: a key of :data:`PROPERTIES`.

    Raises:
        Violation: see :func:`check_objective`.
        NotApplicable: if the objective does not promise this property.
    """
    for rows in BATCHES[name](make_objective(make)):
        try:
            PROPERTIES[name](make, rows)
        except NotApplicable:
            raise
        except Exception as error:
            known = isinstance(error, Violation)
            problem = str(error) if known else f"raised {type(error).__name__}: {error}"
            objective = getattr(getattr(make, "func", make), "__name__", make)
            raise Violation(f"{objective}, {name}: {problem}\n{_describe(rows)}") from (None if known else error)


def _describe(rows: Sequence[Row]) -> str:
    lines = [f"smallest batch that shows it: {len(rows)} example(s)"]
    for row in rows:
        label = "" if row.desirable is None else ", desirable" if row.desirable else ", undesirable"
        score = "" if row.score is None else f", score {row.score:.3g}"
        prompt = f"prompt {row.group} of {len(row.prompt)}"
        lengths = " and ".join(str(len(branch)) for branch in row.branches)
        lines.append(f"  {row.id}: {prompt}, completions of {lengths} tokens{label}{score}")
    return "\n".join(lines)
