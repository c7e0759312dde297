"""Examples of given lengths, for a traced step."""

from __future__ import annotations

from halos.data.preparation.needs import DataNeeds
from halos.data.rows.joint_rows import joint_row
from halos.data.rows.token_rows import Row, ViewRows


def rows(needs: DataNeeds, count: int, prompt: int, completion: int) -> list[Row]:
    """Return examples of these lengths that have no tokens in common."""
    views = needs.views or (needs,)
    step_rows = []
    for number in range(count):
        # Other first tokens keep prompts and completions apart; the model's vocabulary does not matter here.
        examples = [ViewRows(v.view, (_row(v, number, prompt, completion),), v.flags.mismatched) for v in views]
        step_rows.append(joint_row(f"{number}", number, examples) if needs.views else examples[0].rows[0])
    return step_rows


def _row(needs: DataNeeds, number: int, prompt: int, completion: int) -> Row:
    branches = 1 + (needs.view == "pairs") + needs.flags.mismatched
    # The mismatched completion is another one than those of pairs.
    starts = [*range(branches - needs.flags.mismatched), *([9] if needs.flags.mismatched else [])]
    return Row(
        f"{number}#0",
        number // 2 if needs.flags.grouped else number,
        (number + 1, *(0,) * (prompt - 1)),
        tuple((start, *(0,) * (completion - 1)) for start in starts),
        desirable=number % 2 == 0 if needs.view in ("binary", "scored") else None,
        score=0.25 + 0.5 * (number % 2) if needs.view == "scored" else None,
        margin=1.0 if needs.flags.margins else None,
        score_chosen=0.75 if needs.flags.pair_scores else None,
        score_rejected=0.25 if needs.flags.pair_scores else None,
    )
