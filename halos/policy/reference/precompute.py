"""The reference's log-probs, computed once before training."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from halos.data.batches.collate import Batch, collate
from halos.data.batches.reference_table import ReferenceTable, completions
from halos.data.rows.token_rows import Row
from halos.policy.backbone import Backbone
from halos.policy.logprobs.head import evaluating
from halos.policy.reference.cache import ReferenceCache, model_key
from halos.processes import signals
from halos.processes.collectives import all_gather_list, all_max, data_rank_and_world, from_rank_zero, rank_and_world

TOKENS = 4096
"""Tokens in one forward."""
KEEP_SECONDS = 60.0
"""Each rank keeps what it has found this often, for a run that is killed."""

Work = list[tuple[bytes, Row]]
Track = Callable[[Sequence[Work]], Iterable[Work]]


def reference_table(
    backbone: Backbone,
    rows: Iterable[Row],
    *,
    folder: Path,
    precision: str,
    packing: bool = True,
    share_prompts: bool = True,
    track: Track = iter,
) -> tuple[ReferenceTable, float]:
    """Log-probs of all branches of the rows under the policy as it is now, and the seconds that this took.

    What the cache in ``folder`` has is read, the rest computed, divided over the ranks, and added to it. All ranks end
    with the same table. ``track`` shows progress over the forwards. Of a run that is killed, the cache has what it
    found until about a minute before; a signal that it can handle loses nothing.
    """
    start = time.perf_counter()
    cache = ReferenceCache(folder, model_key(backbone.policy, precision))
    wanted = completions(rows)
    alone = rank_and_world()[1] == 1
    known = _known(cache, wanted, alone)
    new = ((name, Row("", 0, prompt, (ids,))) for name, (prompt, ids) in wanted.items() if name not in known)
    rank, world = data_rank_and_world()
    everything = list(_batches(new))
    work = everything[rank::world]
    most = len(everything[::world])
    if backbone.sharded and len(work) < most:
        work.append(everything[0])  # ranks that hold parts of one model run equally many forwards
    mine = iter(track(work))
    found: list[tuple[bytes, Tensor]] = []
    interim = _Interim(cache)
    deferred = signals.defer(True)
    with evaluating(backbone), torch.no_grad():
        for _ in range(most):  # equally often on all ranks, so that they can hear of signals
            if part := next(mine, None):
                chunks = 1 if backbone.sharded else -(-len(part) // 16)
                batch = collate([row for _, row in part], chunks=chunks, packing=packing, share_prompts=share_prompts)
                found += _score(backbone, part, batch)
            (number,) = all_max([signals.received()], backbone.device)
            interim.keep(found, now=bool(number))
            signals.stop(number)
    list(mine)  # the bar's last step
    signals.defer(deferred)
    added = {k: v for part in all_gather_list([_packed(dict(found))]) for k, v in _unpacked(part).items()}
    if added:
        whole = from_rank_zero(lambda: cache.write(added))
        interim.replace_by(whole)
        if whole is not None and alone:
            added = cache.read_part(whole)  # the same numbers, memory-mapped
    return ReferenceTable(known | added, computed=len(added)), time.perf_counter() - start


def _known(cache: ReferenceCache, wanted: Collection[bytes], alone: bool) -> dict[bytes, Tensor]:
    """What the cache has of the entries that are wanted; memory-mapped for one process, sent to several."""

    def found() -> dict[bytes, Tensor]:
        return {key: values for key, values in cache.read().items() if key in wanted}

    return found() if alone else _unpacked(from_rank_zero(lambda: _packed(found())))


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


Packed = tuple[list[bytes], list[int], Any]
"""Keys, lengths, and all values in one array: pickled one by one, each tensor would bring the whole part of the cache
that it is a view of."""


def _packed(entries: Mapping[bytes, Tensor]) -> Packed:
    values = [entry.numpy() for entry in entries.values()]
    return list(entries), [len(entry) for entry in values], np.concatenate(values) if values else np.zeros(0, "f4")


def _unpacked(packed: Packed) -> dict[bytes, Tensor]:
    keys, lengths, values = packed
    return dict(zip(keys, torch.from_numpy(values).split(lengths), strict=True)) if keys else {}


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


def _score(backbone: Backbone, work: Work, batch: Batch) -> list[tuple[bytes, Tensor]]:
    tokens = backbone.logprobs(batch.to(backbone.device)).tokens[:, 0].float().cpu()
    return [(name, tokens[n, : len(row.branches[0])].clone()) for n, (name, row) in enumerate(work)]
