"""Compute the reference's log-probs once, before training.

1. Look up the completions of all rows in the cache.
2. For :data:`BLOCK` rows at a time, list the missing completions, each once. Divide them into forward passes of up to
   :data:`TOKENS` tokens (:mod:`.forwards`), and distribute these over the ranks.
3. Each rank computes its forward passes, and saves its results to the cache about once a minute.
4. All ranks exchange their results. Rank 0 writes them as one part of the cache, which replaces the interim parts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from halos.caches import PRIVATE, Seals
from halos.data.batches.batch import Batch
from halos.data.batches.collate import collate
from halos.data.batches.reference_entries import KEY_BYTES, Entries, GrowingEntries, Serialised
from halos.data.batches.reference_table import ReferenceTable, completions, keys_of
from halos.data.rows.token_rows import Row
from halos.policy.backbone import Backbone
from halos.policy.logprobs.head import evaluating
from halos.policy.logprobs.packed import can_pack
from halos.policy.reference.cache import UNREADABLE, ReferenceCache, model_key
from halos.policy.reference.forwards import Work, forwards
from halos.processes import signals
from halos.processes.collectives import all_gather_list, all_max, data_rank_and_world, from_rank_zero, rank_and_world

BLOCK = 1 << 14
"""Rows whose token ids are in memory at a time. As a Python number a token takes some 36 bytes."""
TOKENS = 4096
"""The maximum number of tokens in one forward pass. A longer row has its own forward pass."""
KEEP_SECONDS = 60.0
"""Seconds between two writes of interim results. A run that is killed loses up to this much work."""
ROWS_PER_CHUNK = 16
"""Rows that are padded to the same length, for models that cannot read packed rows."""

Track = Callable[[Sequence[Work]], Iterable[Work]]
KeyedLogProbs = list[tuple[bytes, Tensor]]
"""The key and the log-probs of completions."""


def reference_table(
    backbone: Backbone,
    rows: Collection[Row],
    *,
    folder: Path,
    seals: Seals = PRIVATE,
    precision: str,
    packing: bool = True,
    share_prompts: bool = True,
    track: Track = iter,
) -> tuple[ReferenceTable, float]:
    """Return log-probs of all branches of the rows under the policy as it is now. All ranks get the same table.

    A run that is killed loses about the last minute of its work. A signal that the process can handle loses nothing.

    Args:
        backbone: the model whose policy is the reference.
        rows: the rows of all data, the same on each rank.
        folder: root of the cache, from which entries are read and to which new ones are added.
        seals: which entries of the cache may be used.
        precision: what the numbers depend on besides the weights; part of the cache's key.
        packing, share_prompts: how to compute; see :func:`halos.data.batches.collate.collate`.
        track: wraps the list of this rank's forwards to show progress.

    Returns:
        The table, and the seconds that it took.
    """
    start = time.perf_counter()
    cache = ReferenceCache(folder, model_key(backbone.policy, precision), seals)
    entries, computed = GrowingEntries(folder), 0
    entries.add(_known(cache, keys_of(rows)))
    layout = {"packing": packing, "share_prompts": share_prompts}
    remaining = iter(rows)
    while block := list(islice(remaining, BLOCK)):
        if missing := list(completions(block, entries).items()):
            found = _compute_all(backbone, cache, missing, track, **layout)
            entries.add(found)
            computed += len(found)
    return ReferenceTable(entries.joined(), computed=computed), time.perf_counter() - start


def _compute_all(
    backbone: Backbone, cache: ReferenceCache, missing: Work, track: Track, *, packing: bool, share_prompts: bool
) -> Entries:
    """Compute the log-probs of these completions on all ranks, and write them to the cache."""
    # completions() sorts by prompt length, so that the rows of a forward pass need little padding. Packs need none, so
    # they are sorted by tokens, and shared beginnings are computed once. Both orders depend only on the rows: all ranks
    # make the same batches without exchanging any.
    shared = packing and share_prompts
    # can_pack() cannot try out a sharded model, whose weights are gathered only within its own forward pass.
    if shared and not backbone.sharded and can_pack(backbone.policy):
        missing.sort(key=lambda item: (item[1].prompt, item[1].branches))
    batches = list(forwards(missing, TOKENS, share_prompts=shared))
    interim = _InterimParts(cache)

    def collated(work: Work) -> Batch:
        # Every forward pass of a sharded model gathers weights from all ranks, so each rank must run exactly one for
        # each batch. Other models read the rows in chunks, which need less padding.
        chunks = 1 if backbone.sharded else -(-len(work) // ROWS_PER_CHUNK)
        return collate([row for _, row in work], chunks=chunks, packing=packing, share_prompts=share_prompts)

    own = _compute(backbone, batches, interim, collated, track)
    # Ranks exchange entries by pickle, and a pickled tensor would bring along its whole storage.
    found = Entries.joined(Entries.of(*serialised) for serialised in all_gather_list([_serialised(own)]))
    part = from_rank_zero(lambda: cache.write(found))
    interim.replace_by(part)
    return _mapped(cache, part, found)


def _mapped(cache: ReferenceCache, part: Path | None, found: Entries) -> Entries:
    """Return the same numbers, memory-mapped from the cache's file if this process can read it."""
    with suppress(*UNREADABLE):
        mapped = None if part is None else cache.read_part(part)
        # Another host may have a file with this name whose numbers differ by rounding.
        if mapped is not None and (_alone() or all(torch.equal(mapped[key], found[key]) for key in found)):
            return mapped
    return found


def _alone() -> bool:
    return rank_and_world()[1] == 1


def _known(cache: ReferenceCache, wanted: Iterable[bytes]) -> Entries:
    """Return the cache's entries, memory-mapped; if ranks read different files, rank 0's entries for the wanted keys.

    All ranks have to agree on which entries are missing, also on hosts that do not share files. So in the second case
    rank 0 sends its entries.
    """
    entries, seals = cache.read_with_seals()
    if _alone():
        return entries
    first_seals = from_rank_zero(lambda: seals)
    (differ,) = all_max([int(seals != first_seals)])
    return Entries.of(*from_rank_zero(lambda: entries.only(wanted).serialised())) if differ else entries


def _compute(
    backbone: Backbone, batches: Sequence[Work], interim: _InterimParts, collated: Callable[[Work], Batch], track: Track
) -> KeyedLogProbs:
    """Compute this rank's share of the batches and return its entries."""
    rank, world = data_rank_and_world()
    # Distributed in turn: neighbouring batches take about the same time, so the ranks finish at about the same time.
    share = list(batches[rank::world])
    rounds = len(batches[::world])  # the share of rank 0, which is the largest
    if backbone.sharded and len(share) < rounds:
        share.append(batches[0])  # any batch: the forward pass is needed, its result is a duplicate
    own: KeyedLogProbs = []
    tracked = iter(track(share))
    # A signal must not end one rank while the others wait for it in a collective. So signals are deferred, and all
    # ranks exchange them after each round. For this each rank runs the same number of rounds, with or without work.
    deferred = signals.defer(True)
    with evaluating(backbone), torch.no_grad():
        for _ in range(rounds):
            if work := next(tracked, None):
                own += _score(backbone, work, collated(work))
            (number,) = all_max([signals.received()])
            interim.save(own, now=bool(number))
            signals.stop(number)
    list(tracked)  # lets the progress bar finish
    signals.defer(deferred)
    return own


def _score(backbone: Backbone, work: Work, batch: Batch) -> KeyedLogProbs:
    tokens = backbone.logprobs(batch.to(backbone.device)).tokens[:, 0].float().cpu()
    # Copies: a slice would keep the whole padded grid in memory.
    return [(key, tokens[n, : len(row.scored(0))].clone()) for n, (key, row) in enumerate(work)]


class _InterimParts:
    """Writes this rank's results so far as parts of the cache. Later one part with all ranks' results replaces them."""

    def __init__(self, cache: ReferenceCache) -> None:
        self.cache, self.written_at = cache, time.perf_counter()
        self.parts: list[Path] = []
        self.count = 0
        """The number of entries that have been written."""

    def save(self, entries: KeyedLogProbs, *, now: bool = False) -> None:
        """Write the entries since the last write, if it was :data:`KEEP_SECONDS` ago or ``now`` is set."""
        is_due = now or time.perf_counter() - self.written_at >= KEEP_SECONDS
        if len(entries) == self.count or not is_due:
            return
        part = self.cache.write(dict(entries[self.count :]))
        if part is not None:
            self.parts.append(part)
        self.count, self.written_at = len(entries), time.perf_counter()

    def replace_by(self, final: Path | None) -> None:
        """Remove the interim parts. Nothing is removed if the final part could not be written."""
        for part in self.parts if final is not None else ():
            if part != final:  # parts are named after their keys, so a single interim part can be the final one
                part.unlink(missing_ok=True)


def _serialised(scored: KeyedLogProbs) -> Serialised:
    keys = np.frombuffer(b"".join(key for key, _ in scored), np.uint8).reshape(-1, KEY_BYTES)
    values = [entry.numpy() for _, entry in scored]
    lengths = np.array([len(entry) for entry in values], np.int64)
    return keys, lengths, np.concatenate(values) if values else np.zeros(0, np.float32)
