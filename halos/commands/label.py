"""``label(cfg)``: samples and a judge → feedback that can be trained on."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

from omegaconf import DictConfig

from halos import terminal
from halos.data.sources.base import Source
from halos.data.sources.json_source import JsonSource
from halos.files import write_atomically
from halos.judges.labels import KINDS, label as labelled
from halos.judges.making import make_judge


def label(cfg: DictConfig) -> Path:
    """Label the samples as configured and write ``cfg.output``.

    Raises ``ValueError`` for a bad configuration or bad samples, before the judge is asked.
    """
    terminal.set_up_logging()
    output = Path(cfg.output)
    if cfg.feedback not in KINDS:
        raise ValueError(f"feedback: expected one of {', '.join(KINDS)}; found {cfg.feedback!r}")
    if cfg.get("judge") is None:
        raise ValueError("judge: expected judge=truth, judge=reward_model or judge=chat, found none")
    if output.exists() and not cfg.overwrite:
        raise ValueError(f"output: {output} exists; choose another file, or set overwrite=true to replace it")
    samples = JsonSource(cfg.samples)
    records = samples.train().records
    world: Source = build_data(cfg.data, seed=cfg.seed).source if cfg.get("data") else samples
    track = partial(terminal.track, "asking the judge", shown=cfg.progress)
    judge = make_judge(cfg.judge, world, device=cfg.device, precision=cfg.precision, track=track)
    rows, counts = labelled(records, judge, cfg.feedback)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(output, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    for name, count in [*counts.items(), *judge.report().items()]:
        terminal.say(f"{name}: {count:g}")
    terminal.say(f"feedback: {output}")
    return output
