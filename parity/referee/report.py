"""The report of the referee in Markdown, from the rows of its JSON."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from parity.referee.properties import PROPERTIES

Row = dict[str, str]
"""library, version, loss, property, verdict, detail and batch."""
READ = {
    ("TRL 1.16.0", "another prompt's y'"): (
        "`KTOTrainer._prepare_dataset` rotates the completions of each `per_device_train_batch_size` rows by one, "
        "whatever their prompts; a last batch of one row keeps its own. A batch size of 1 is refused"
    ),
    ("TRL 1.16.0", "uneven accumulation"): (
        "the loss is a mean over the micro-batch, and the Trainer of transformers divides by the number of "
        "micro-batches, so the lone example weighs as much as the other two together"
    ),
    ("TRL 1.16.0", "weights"): (
        "`_set_signature_columns_if_needed` has no such column, and `remove_unused_columns` drops it"
    ),
    ("HALOs commit 4831988", "value at step 0"): (
        "`get_sequence_rewards(length_normalized=True)` counts the tokens whose log-ratio is not 0: none, so 0/0"
    ),
    ("HALOs commit 4831988", "padding"): (
        "`SLiCTrainer.loss` adds a loss for each sequence, [B], to one for each token, [B, T]"
    ),
}
"""Why, as read in the source of the version; a failure of another version has none until it is read again."""
SIGNS = {"kept": "kept", "broken": "**no**", "documented": "no¹", "raised": "raised", "none": "–"}
INTRODUCTION = """# The referee

<!-- written by `make referee`; change parity/referee/report.py -->

This page says which properties of halos' [conformance kit](../extend/loss.md) the losses of other libraries keep, as
they are installed. `make referee` runs the checks of [parity/referee](../../parity/referee) on a Llama of two layers
with random weights on the CPU, and writes this page and [referee.json](referee.json). The page lists what was
observed, with the smallest batch that shows it. A property that a library does not keep is not always a fault: the
library may document it, or leave it to its caller. Versions that are not named here were not tested.
"""
NOTES = """## What the properties mean

Loss and gradient are compared by every weight of the policy, in float32, to 10⁻⁵ of the largest number.

{properties}

- *kept*: every batch that was tried agrees, including one of a single example if the property makes sense for it.
- **no**: a batch was found that violates the property. It is listed below the table, with the reason from the source.
- no¹: the same, and the library's documentation says so.
- raised: the loss ends in an error on the batches of this check, so nothing is known about the property itself.
- –: does not apply, or was not run; the [JSON](referee.json) has the reason.

How each library is run:

- **TRL**: `KTOTrainer` and `DPOTrainer` with their own data preparation, collators, losses and training steps (SGD
  with rate 1, whose change of the weights is the gradient). Steps are run for the first loss of each trainer: they are
  the same code for the others. `gradient_checkpointing` and `bf16`, on by default, are off.
- **Liger**: the modules of `liger_kernel.chunked_loss`, without compilation and Triton. The forward of the model, z₀
  and the division of a step are the caller's, so nothing is said about them.
- **HALOs**: forward passes, losses and the loop of `train()` of its trainers, from a checkout. Its data loaders and
  its training on ranks were not run.
"""


def markdown(rows: Sequence[Row]) -> str:
    """Return the page."""
    blocks = [INTRODUCTION]
    for (library, version), own in groupby(rows, lambda row: (row["library"], row["version"])):
        blocks.append(_library(library, version, list(own)))
    described = "\n".join(f"- **{name}**: {_first_line(name)}" for name in PROPERTIES)
    blocks.append(NOTES.format(properties=described))
    return "\n".join(blocks)


def _first_line(name: str) -> str:
    return " ".join((PROPERTIES[name].__doc__ or "").split())


def _library(library: str, version: str, rows: Sequence[Row]) -> str:
    # Properties that apply to no loss of a library need no column.
    used = [name for name in PROPERTIES if any(r["property"] == name and r["verdict"] != "none" for r in rows)]
    table = {(row["loss"], row["property"]): row for row in rows}
    lines = [f"## {library} {version}", "", f"| loss | {' | '.join(used)} |", "|---" * (len(used) + 1) + "|"]
    for loss in dict.fromkeys(row["loss"] for row in rows):
        lines.append(f"| {loss} | {' | '.join(SIGNS[table[loss, name]['verdict']] for name in used)} |")
    lines += ["", *_details(rows, "broken", "What shows it:")]
    lines += _details(rows, "raised", "What was raised:")
    lines += _details(rows, "documented", "What the documentation says:")
    return "\n".join(lines)


def _details(rows: Sequence[Row], verdict: str, title: str) -> list[str]:
    # Losses about which the same was found share a line.
    shared: dict[tuple[str, str, str], list[str]] = {}
    for row in rows:
        if row["verdict"] == verdict:
            shared.setdefault((row["property"], row["detail"], row["batch"]), []).append(row["loss"])
    where = f"{rows[0]['library']} {rows[0]['version']}"
    lines = []
    for (name, detail, batch), losses in shared.items():
        known = verdict != "documented" and (where, name) in READ
        reason = f" In the source: {READ[where, name]}." if known else ""
        lines.append(f"- *{name}*, {', '.join(losses)}: {detail}{f' (with {batch})' if batch else ''}.{reason}")
    return [title, "", *lines, ""] if lines else []
