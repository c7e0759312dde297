"""``label(cfg)``: has a judge turn samples into feedback that can be trained on."""

import json
from pathlib import Path

from omegaconf import DictConfig

from halos import terminal
from halos.commands.judge import make_judge
from halos.config.nodes import build
from halos.data.sources.base import Source
from halos.data.sources.feedback_files import FeedbackFiles
from halos.files import write_atomically
from halos.judges.labels import label as label_records


def label(cfg: DictConfig) -> Path:
    """Have a judge label samples, and write the feedback into the file ``cfg.output``.

    Returns:
        The file.

    Raises:
        ValueError: a setting or the samples cannot work (found before the judge is asked), or the judge answers
            nothing.
    """
    terminal.set_up_logging(models="path" in (cfg.get("judge") or {}))  # a judge with a path is a model
    output = Path(cfg.output)
    if output.exists() and not cfg.overwrite:
        raise ValueError(f"output: {output} exists; choose another file, or set overwrite=true to replace it")
    samples = FeedbackFiles(cfg.samples)
    records = samples.train().records
    # The true reward (judge=truth) belongs to the source that the prompts came from.
    world: Source = build(cfg.data.source) if cfg.get("data") else samples
    judge = make_judge(cfg.get("judge"), world, device=cfg.device, precision=cfg.precision, progress=cfg.progress)
    # Weights are read or requests sent only from here on: everything above is cheap and finds most mistakes.
    rows, counts = label_records(records, judge, cfg.feedback)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(output, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    for name, count in [*counts.items(), *judge.report().items()]:
        terminal.say(f"{name}: {count:g}")
    terminal.say(f"feedback: {output}")
    return output
