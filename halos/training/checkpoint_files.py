"""Finds the checkpoint to resume from, and checks that it is intact and belongs to the run."""

from __future__ import annotations

import logging
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from halos.sharding.reading import META, check_sharded

log = logging.getLogger(__name__)

PATTERN = "step_*.ckpt"
LAST, BEST = "last.ckpt", "best.ckpt"
IDENTITY = "halos"
"""Key under which a checkpoint stores the identity of its run: {configuration key: value}."""


def step_of(path: Path) -> int:
    """Return the optimizer step after which a checkpoint was saved, which is in its name."""
    return int(path.stem.removeprefix("step_"))


def by_step(folder: Path) -> list[Path]:
    """Return the checkpoints of a folder, the latest step first."""
    # Modification times are less reliable: clocks differ, and copying changes times.
    return sorted((path for path in folder.glob(PATTERN) if path.stem[5:].isdecimal()), key=step_of, reverse=True)


def newest(folder: Path) -> Path | None:
    """Return the newest intact checkpoint, or None if there is no checkpoint at all.

    Damaged checkpoints are skipped with a warning.

    Raises:
        ValueError: all checkpoints are damaged.
    """
    damaged: list[str] = []
    paths, last = by_step(folder), folder / LAST
    if last.exists():
        # After a kill, the link may still lead to the second newest checkpoint. In a copied folder it is a file.
        paths.insert(0 if not paths or last.samefile(paths[0]) else 1, last)
    for path in paths:
        try:
            check_intact(path)
        except ValueError as error:
            damaged.append(str(error))
            continue
        if damaged:
            log.warning("%s; going on from %s instead", "; ".join(damaged), path)
        return path
    if damaged:
        raise ValueError("; ".join(damaged))
    return None


def check_intact(path: Path) -> None:
    """Raise ``ValueError`` for a file or folder that is truncated, altered or not a checkpoint."""
    if path.is_dir():
        check_sharded(path)
        return
    # A checkpoint is a zip file with checksums. Its table of contents is at the end, so a truncated file has none.
    try:
        with zipfile.ZipFile(path) as archive:
            damage = archive.testzip()
    except (zipfile.BadZipFile, OSError, NotImplementedError, RuntimeError, EOFError) as error:
        damage = str(error)
    if damage is not None:
        found = f"{path}, which is damaged or something else ({damage})"
        raise ValueError(f"resume: expected a checkpoint file, found {found}")


def read(path: Path) -> Mapping[str, Any]:
    """Return the contents of a checkpoint, without the weights if it is sharded.

    Raises:
        ValueError: it is not a checkpoint of this program.
    """
    file = path / META if path.is_dir() else path
    try:
        # Memory-mapped: only the pages that are read are loaded.
        options: dict[str, Any] = {"map_location": "cpu", "mmap": True}
        checkpoint: Mapping[str, Any] = torch.load(file, weights_only=True, **options)  # noqa: TID251 (no code is run)
        checkpoint[IDENTITY]  # a file of another program has none
    except Exception as error:  # torch raises several kinds
        raise ValueError(f"resume: expected a checkpoint of this program, found {path}: {error!r}") from error
    return checkpoint


def check_identity(path: Path, identity: Mapping[str, object]) -> Mapping[str, Any]:
    """Check that a checkpoint belongs to the run with this identity, and return its contents.

    Raises:
        ValueError: it belongs to another run (the error lists the keys that differ), or is not a checkpoint of this
            program.
    """
    checkpoint = read(path)
    saved: Mapping[str, object] = checkpoint[IDENTITY]
    if keys := [key for key in dict.fromkeys((*saved, *identity)) if saved.get(key) != identity.get(key)]:
        values = [f"{key}: {saved.get(key, 'none')} in the checkpoint, {identity.get(key, 'none')} now" for key in keys]
        raise ValueError(f"resume: {path} belongs to another run ({'; '.join(values)})")
    return checkpoint
