"""``propose=FILE.yaml``: looks at files of feedback and writes a mapping of their columns."""

from itertools import chain, islice
from pathlib import Path

from omegaconf import DictConfig

from halos.config.nodes import build
from halos.data.layouts.layouts import Layouts
from halos.data.layouts.propose import as_yaml, propose
from halos.data.reading.files import Piece
from halos.data.records.record import Record, messages_of, reply_text
from halos.data.sources.combined import scores_in_a_row
from halos.data.sources.feedback_files import FeedbackFiles
from halos.files import write_atomically
from halos.terminal import console, styled

ROWS = 200
"""The number of rows that a proposal looks at."""
SHOWN = 3
"""The number of records that are shown as they would be read."""
LONGEST_SHOWN = 200
"""Characters of a text that are shown."""


def write_proposal(cfg: DictConfig) -> None:
    """Write a proposal for ``cfg.data.train`` to ``cfg.propose``, and show what the first rows become.

    Raises:
        ValueError: the data source has a format of its own, a file is empty, or nothing can be proposed.
    """
    target = Path(cfg.propose)
    source = build(cfg.data.source)
    if not isinstance(source, FeedbackFiles):
        raise ValueError(f"propose: expected data=files, found data={source.name}, whose format is known")
    if target.suffix != ".yaml":
        raise ValueError(f"propose: expected a file that ends in .yaml, found {str(target)!r}")
    file = next(source.files())
    located = list(islice(source.rows(Piece(file, expansion=cfg.data.max_expansion)), ROWS))
    if not located:
        raise ValueError(f"{file}: expected at least one row, found an empty file")
    proposal = propose([row for _, row in located], source.declaration)
    train = str(Path(file).resolve()) if Path(file).exists() else str(file)
    layouts = Layouts(proposal.declaration)
    adapted = scores_in_a_row(chain.from_iterable(layouts.adapted(where, row) for where, row in located))
    records = [record for _, record, _ in adapted if record is not None]
    for record in records[:SHOWN]:
        _show(record)
    for remark in proposal.remarks:
        console.print(styled(("look at this: ", "yellow"), remark))
    target.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(target, as_yaml(proposal, train))
    console.print(
        styled(f"{len(located):,} rows looked at, {len(records):,} records; mapping → ", (str(target), "bold"))
    )
    console.print(f"to use it, put it into a folder DIR/data: halos train --config-dir DIR data={target.stem}")


def _show(record: Record) -> None:
    console.print(styled((record.id, "bold")))
    for turn in messages_of(record.prompt):
        console.print(styled((f"  {turn.role}:", "dim"), f" {turn.text[:LONGEST_SHOWN]}"))
    better = {pair[0] for pair in record.preferences}
    worse = {pair[1] for pair in record.preferences}
    for place, completion in enumerate(record.completions):
        label = {True: "desirable", False: "undesirable"}.get(completion.desirable, "")  # type: ignore[arg-type]
        score = "" if completion.score is None else f"score {completion.score:g}"
        rank = "preferred" if place in better - worse else "rejected" if place in worse - better else ""
        said = ", ".join(word for word in (label, score, rank) if word) or "completion"
        console.print(styled((f"  {said}:", "bold"), " ", (reply_text(completion.reply)[:LONGEST_SHOWN], "green")))
