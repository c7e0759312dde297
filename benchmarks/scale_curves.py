"""``python -m benchmarks.scale_curves --rows 10_000_000 --folder DIR``: the cost of a completion as data grow.

Measures times and memory that grow with the number of completions, each part in a process of its own. Nothing is
tokenised and no model runs: token ids and keys are random. The times are CPU seconds, except for the checkpoint, whose
time is elapsed time. The folder is removed at the end.

- index: the index of cached reference log-probs, made of blocks as the reference pass makes them, and look-ups in it;
- columns: opening a table of token rows, which reads their labels, groups and sizes into memory;
- partners: drawing KTO's mismatched completions;
- order: one epoch of the order of training, which the reference pass reads;
- plan: reading rows, and dividing their completions into the forwards of the reference pass;
- hash, checkpoint: SHA-256 and a checkpoint of 2 GiB; these do not depend on ``--rows``.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from benchmarks.scale import report
from halos.data.batches.order import Division, TrainingOrder
from halos.data.batches.reference_entries import KEY_BYTES, Entries, GrowingEntries
from halos.data.batches.reference_table import completions, keys_of
from halos.data.rows.chat_tokens import ChatTokens, Limits
from halos.data.rows.mismatch import derangement
from halos.data.rows.token_rows import COLUMNS, Row, TokenRows
from halos.data.store.table import Table
from halos.files import move_into_place, sha256_of
from halos.policy.reference.forwards import Work, forwards
from halos.policy.reference.precompute import BLOCK, TOKENS as FORWARD_TOKENS
from halos.toy.model import build_tokenizer
from halos.training.checkpoints import LocalCheckpointIO

BATCH = 1 << 16
LOOKUPS = 100_000
READ_ROWS = 16_384
READ_TOKENS = 100
STATE_BYTES = 2 << 30


def main(words: list[str] | None = None) -> None:
    """Measure the parts, each in a process of its own; with ``--here`` only the first, in this process."""
    made = argparse.ArgumentParser("benchmarks.scale_curves", description=__doc__)
    made.add_argument("--rows", type=int, default=1_000_000)
    made.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    made.add_argument("--here", action="store_true", help="the first part alone, in this process")
    made.add_argument("--folder", type=Path, required=True)
    options = made.parse_args(words)
    options.folder.mkdir(parents=True, exist_ok=True)
    if options.here:
        print(f"{PARTS[options.parts[0]](options.folder, options.rows):.3f}")
        return
    try:
        for part in options.parts:
            command = [sys.executable, "-m", "benchmarks.scale_curves", "--here", "--folder", str(options.folder)]
            seconds = report(part, [*command, "--rows", str(options.rows), "--parts", part])
            print(f"  {1e6 * seconds / options.rows:.3g} µs a row", flush=True)
            for notes in options.folder.glob("*.txt"):
                print(f"  {notes.read_text()}", flush=True)
                notes.unlink()
    finally:
        shutil.rmtree(options.folder)


def index(folder: Path, rows: int) -> float:
    """Add an entry for each row, in blocks of the reference pass's size; then look up present and absent keys."""
    draw, values = np.random.default_rng(0), torch.zeros(2 * BLOCK)
    entries, some = GrowingEntries(folder), list[bytes]()
    start = time.process_time()
    for size in _sizes(rows, 2 * BLOCK):
        keys = draw.integers(0, 256, (size, KEY_BYTES), np.uint8)
        entries.add(Entries.of(keys, np.ones(size, np.int64), values[:size]))
        some.append(keys[0].tobytes())
    joined = entries.joined()
    seconds = time.process_time() - start
    present = random.Random(0).choices(some, k=LOOKUPS)
    absent = [draw.bytes(KEY_BYTES) for _ in range(LOOKUPS)]
    found = _timed(lambda: [joined[key] for key in present])
    missing = _timed(lambda: [key in joined for key in absent])
    cost = ", ".join(f"{1e6 * took / LOOKUPS:.1f} µs" for took in (found, missing))
    (folder / "index.txt").write_text(f"{len(joined):,} entries; a look-up of a present key, of an absent one: {cost}")
    return seconds


def columns(folder: Path, rows: int) -> float:
    """Opening the table."""
    _write_table(folder / "rows.arrow", rows)
    return _timed(lambda: _open_table(folder / "rows.arrow"))


def partners(folder: Path, rows: int) -> float:
    """Drawing a mismatched completion for each row."""
    groups = np.arange(rows, dtype=np.int32) // 2
    return _timed(lambda: derangement(groups, 0))


def order(folder: Path, rows: int) -> float:
    """The rows of one epoch, two of a prompt together."""
    division = Division(batch_size=64, steps=rows // 64)
    groups = np.arange(rows, dtype=np.int32) // 2

    def read() -> None:
        listed = TrainingOrder(rows, division, groups=groups, together=2)
        np.unique(np.array([row for micro in listed for row in micro.rows], np.int64))

    return _timed(read)


def plan(folder: Path, rows: int) -> float:
    """The work of each rank on all rows, before its share of the forward passes. Estimated from some of the rows."""
    count = min(rows, READ_ROWS)
    _write_table(folder / "rows.arrow", count, tokens=READ_TOKENS)
    table, read, works = _open_table(folder / "rows.arrow"), list[Row](), list[Work]()
    reading = _timed(lambda: read.extend(table[n] for n in range(count)))
    hashing = _timed(lambda: list(keys_of(read)))
    missing: Work = []
    listing = _timed(lambda: missing.extend(completions(read).items())) - hashing
    dividing = _timed(lambda: works.extend(forwards(missing, FORWARD_TOKENS, share_prompts=True)))
    parts = {"reading a row": reading, "its key": hashing, "listing it": listing, "dividing": dividing}
    text = ", ".join(f"{name} {1e6 * seconds / count:.1f} µs" for name, seconds in parts.items())
    (folder / "plan.txt").write_text(f"{text}; {count / len(works):.1f} completions in a forward")
    return sum(parts.values()) / count * rows


def hashed(folder: Path, rows: int) -> float:
    """SHA-256 of a file in the page cache."""
    file = folder / "state"
    with file.open("wb") as out:
        for _ in range(STATE_BYTES >> 20):
            out.write(bytes(1 << 20))
    seconds = _timed(lambda: sha256_of(file))
    (folder / "hash.txt").write_text(f"{STATE_BYTES / seconds / 1e9:.2f} GB/s")
    file.unlink()
    return seconds


def checkpoint(folder: Path, rows: int) -> float:
    """Writing a checkpoint until it is complete on the disk."""
    state = {"weights": torch.rand(STATE_BYTES // 4)}

    def save() -> None:
        LocalCheckpointIO().save_checkpoint(state, folder / "state.part")
        move_into_place(folder / "state.part", folder / "state.ckpt")

    start = time.perf_counter()
    save()
    seconds = time.perf_counter() - start
    (folder / "checkpoint.txt").write_text(f"{STATE_BYTES / seconds / 1e9:.2f} GB/s")
    (folder / "state.ckpt").unlink()
    return seconds


PARTS: dict[str, Callable[[Path, int], float]] = {
    "index": index,
    "columns": columns,
    "partners": partners,
    "order": order,
    "plan": plan,
    "hash": hashed,
    "checkpoint": checkpoint,
}


def _timed(work: Callable[[], object]) -> float:
    """The CPU seconds that the work takes."""
    start = time.process_time()
    work()
    return time.process_time() - start


def _sizes(total: int, size: int) -> Iterator[int]:
    return (min(size, total - start) for start in range(0, total, size))


def _write_table(file: Path, rows: int, tokens: int = 12) -> None:
    draw, first = np.random.default_rng(0), 0
    schema = pa.schema(COLUMNS.items())
    with pa.ipc.new_file(str(file), schema) as writer:
        for size in _sizes(rows, BATCH):
            numbers = np.arange(first, first + size)
            ids = _lists(draw.integers(0, 100, size * tokens, np.int32), size)
            empty = _lists(np.zeros(0, np.int32), size)
            made = {
                "id": pa.array([f"train.jsonl:{n}#0" for n in numbers]),
                **dict.fromkeys(("prompt", "first"), ids),
                **dict.fromkeys(("second", "context"), empty),
                **dict.fromkeys(("prompt_digest", "conversation_digest"), pa.array((numbers // 2).astype(np.uint64))),
                "step": pa.array(np.full(size, -1, np.int32)),
                "label": pa.array((numbers % 2).astype(np.int8)),
                "score": pa.array(np.full(size, np.nan)),
                "weight": pa.array(np.ones(size, np.float32)),
                "graded": empty.cast(pa.list_(pa.float64())),
            }
            writer.write_batch(pa.record_batch([made[name] for name in schema.names], schema=schema))
            first += size


def _lists(values: np.ndarray, count: int) -> pa.Array:
    """The values as ``count`` lists of equal length."""
    offsets = np.arange(count + 1, dtype=np.int32) * (len(values) // count)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))


def _open_table(file: Path) -> TokenRows:
    reader = pa.ipc.open_file(pa.memory_map(str(file)))
    batches = [reader.get_batch(n) for n in range(reader.num_record_batches)]
    return TokenRows(Table(batches), ChatTokens(build_tokenizer(), Limits(512)), lambda _: "")


if __name__ == "__main__":
    main()
