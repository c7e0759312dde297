"""The reference's log-probs, computed once before training."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from halos import signals
from halos.data.batches import Batch, collate
from halos.data.reference import ReferenceTable, completions
from halos.data.rows import Row
from halos.distributed import all_gather_list, all_max, from_rank_zero, rank_and_world
from halos.policy.cache import ReferenceCache, model_key
from halos.policy.head import evaluating
from halos.policy.logprobs import completion_logprobs

TOKENS = 4096
"""Tokens in one forward."""
KEEP_SECONDS = 60.0
"""Each rank keeps what it has found this often, for a run that is killed."""

Work = list[tuple[bytes, Row]]
Track = Callable[[Sequence[Work]], Iterable[Work]]


def reference_table(
    model: Any,
    rows: Iterable[Row],
    *,
    folder: Path,
    precision: str,
    packing: bool = True,
    share_prompts: bool = True,
    head_chunk: int | None = None,
    track: Track = iter,
) -> tuple[ReferenceTable, float]:
    """Log-probs of all branches of the rows under the model as it is now, and the seconds that this took.

    What the cache in ``folder`` has is read, the rest computed, divided over the ranks, and added to it. All ranks end
    with the same table. ``track`` shows progress over the forwards. Of a run that is killed, the cache has what it
    found until about a minute before; a signal that it can handle loses nothing.
    """
    start = time.perf_counter()
    cache = ReferenceCache(folder, model_key(model, precision))
    wanted = completions(rows)
    known = from_rank_zero(lambda: {name: values for name, values in cache.read().items() if name in wanted})
    new = ((name, Row("", 0, prompt, (ids,))) for name, (prompt, ids) in wanted.items() if name not in known)
    rank, world = rank_and_world()
    work = list(_batches(new))
    mine = iter(track(work[rank::world]))
    found: list[tuple[bytes, Tensor]] = []
    interim = _Interim(cache)
    deferred = signals.defer(True)
    with evaluating(model), torch.no_grad():
        for _ in range(-(-len(work) // world)):  # equally often on all ranks, so that they can hear of signals
            if part := next(mine, None):
                batch = collate(
                    [row for _, row in part], chunks=-(-len(part) // 16), packing=packing, share_prompts=share_prompts
                )
                found += _score(model, part, batch, head_chunk)
            (number,) = all_max([signals.received()], model.device)
            interim.keep(found, now=bool(number))
            signals.stop(number)
    list(mine)  # the bar's last step
    signals.defer(deferred)
    added = dict(all_gather_list(found))
    if added:
        interim.replace_by(from_rank_zero(lambda: cache.write(added)))
    return ReferenceTable(known | added, computed=len(added)), time.perf_counter() - start


class _Interim:
    """What this rank found, in parts of the cache, until the part with all ranks' findings takes their place."""

    def __init__(self, cache: ReferenceCache) -> None:
        self.cache, self.parts, self.count, self.since = cache, list[Path](), 0, time.perf_counter()

    def keep(self, found: Sequence[tuple[bytes, Tensor]], *, now: bool = False) -> None:
        """Write what has been found since the last time, if that is long enough ago or asked for ``now``."""
        if len(found) == self.count or (time.perf_counter() - self.since < KEEP_SECONDS and not now):
            return
        part = self.cache.write(dict(found[self.count :]))
        self.parts += [] if part is None else [part]
        self.count, self.since = len(found), time.perf_counter()

    def replace_by(self, whole: Path | None) -> None:
        """Remove the parts if there is one with everything (it may be one of them)."""
        for part in self.parts if whole is not None else ():
            if part != whole:
                part.unlink(missing_ok=True)


def _batches(items: Iterable[tuple[bytes, Row]]) -> Iterator[Work]:
    batch: Work = []
    tokens = 0
    for name, row in items:
        shared = bool(batch) and batch[-1][1].prompt == row.prompt
        size = len(row.branches[0]) + (0 if shared else len(row.prompt))
        if batch and tokens + size > TOKENS:
            yield batch
            batch, tokens, size = [], 0, len(row.branches[0]) + len(row.prompt)
        batch.append((name, row))
        tokens += size
    if batch:
        yield batch


def _score(model: Any, work: Work, batch: Batch, head_chunk: int | None) -> list[tuple[bytes, Tensor]]:
    tokens = completion_logprobs(model, batch.to(model.device), head_chunk=head_chunk).tokens[:, 0].float().cpu()
    return [(name, tokens[n, : len(row.branches[0])].clone()) for n, (name, row) in enumerate(work)]
