"""What one fresh process is to measure, and the configuration that it means."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

KINDS = ("train", "profile", "saved", "cost", "rate")
PEERS = ("plain", "liger", "trl", "trl_lean", "trl_best")
"""Whom ours is compared with: :mod:`benchmarks.plain` and :mod:`benchmarks.trl_side` have them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One measurement.

    Args:
        kind: ``train`` is one epoch by ``who``. ``profile`` measures where our time goes, and ``saved`` what our
            forward pass keeps for the backward pass. ``cost`` is a point of a cost curve, and ``rate`` the rate of
            matrix products.
        who: ``ours`` or one of :data:`PEERS`.
        model, data: a Hugging Face directory and a file of pairs.
        cache: folder of our reference's log-probs, empty for a new one.
        head_chunk, statistics: ``model.head_chunk`` and ``model.statistics`` of ours.
        shape: of a synthetic model and its rows, for ``cost``.
        repeat: tells equal measurements apart.
    """

    kind: str = "train"
    who: str = "ours"
    loss: str = "kto"
    precision: str = "32-true"
    model: str = ""
    data: str = ""
    batch_size: int = 8
    max_length: int = 512
    max_prompt_length: int | None = 256
    lr: float = 5e-6
    threads: int = 1
    seed: int = 0
    cache: str = ""
    head_chunk: int | None = 512
    statistics: tuple[str, ...] = ()
    shape: tuple[tuple[str, int], ...] = ()
    repeat: int = 0

    def name(self, context: str) -> str:
        """A file name that is the same for the same measurement in the same context (machine, code)."""
        digest = hashlib.sha256(json.dumps([asdict(self), context], sort_keys=True).encode()).hexdigest()[:12]
        return f"{self.kind}-{self.who}-{self.loss}-{self.precision}-{self.repeat}-{digest}"

    def save(self, file: Path) -> None:
        file.write_text(json.dumps(asdict(self)))

    @classmethod
    def load(cls, file: Path) -> Job:
        values = json.loads(file.read_text())
        return cls(**values | {"shape": tuple(map(tuple, values["shape"])), "statistics": tuple(values["statistics"])})


def config(job: Job, folder: Path) -> Any:
    """The configuration of ``scripts/train.py`` for the job, with its outputs in ``folder``; beside what the job says
    and a constant rate, which the peers have too, all settings are the default ones."""
    import hydra

    from halos.config.folder import config_folder

    words = [
        *(f"loss={job.loss}", f"precision={job.precision}", "model=hf", "data=files", f"seed={job.seed}"),
        *(f"data.batch_size={job.batch_size}", f"data.max_length={job.max_length}", f"optim.lr={job.lr}"),
        *("optim.warmup=0", "optim.schedule=constant", "trainer.accelerator=cpu", "trainer.enable_progress_bar=false"),
        *("sampling.prompts=0", "sampling.kl=false"),  # which no rival does
    ]
    with hydra.initialize_config_dir(config_folder(), version_base="1.3"):
        cfg = hydra.compose("train", words)
    cfg.model.path, cfg.data.train = job.model, job.data
    cfg.model.statistics = list(job.statistics)
    cfg.model.head_chunk, cfg.data.max_prompt_length = job.head_chunk, job.max_prompt_length
    cfg.output_dir, cfg.cache_dir = str(folder / "run"), job.cache or str(folder / "cache")
    return cfg
