"""``scripts/data.py``: what is in the data and what is wrong with it, without training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from rich.markup import escape

from halos.building import SOURCE_KEYS, build
from halos.data.feedback import messages_of
from halos.data.module import PreferenceDataModule
from halos.data.rows import Example, texts_of
from halos.data.views import VIEWS, Labelled, Scored
from halos.data.writing import example_row, record_row, write_jsonl
from halos.policy.loading import ModelSpec
from halos.runs.console import console, set_up_logging, show_data, show_example
from halos.runs.data_report import plot_lengths, show_report, write_report

LONGEST_SHOWN = 400


def inspect_data(cfg: DictConfig) -> PreferenceDataModule:
    """Read the data as configured, show and write what is asked for.

    Raises ``ValueError`` for bad data or settings.
    """
    set_up_logging()
    if cfg.view is not None and cfg.view not in VIEWS:
        raise ValueError(f"view: expected one of {', '.join(VIEWS)} or null, found {cfg.view!r}")
    tokens = cfg.model.path is not None
    if tokens and cfg.view is None:
        raise ValueError("model.path: tokens are those of a view's examples; set view=binary (or another)")
    data: PreferenceDataModule = build(cfg.data, without=SOURCE_KEYS, seed=cfg.seed)
    data.read()
    rows: list[dict[str, Any]] = [record_row(record) for record in data.intake.records["train"]] if cfg.convert else []
    lengths = _character_lengths(data)
    if cfg.view is not None:
        data.load(cfg.view)
        examples = data.intake.examples["train"]
        rows = [example_row(example) for example in examples] if cfg.convert else []
        for example in () if tokens else examples[: cfg.show]:
            _show(example)
    if tokens:
        _tokenise(data, cfg)
        train = data.rows["train"].rows
        lengths = {
            "prompt (tokens)": [len(row.prompt) for row in train],
            "completion (tokens)": [len(branch) for row in train for branch in row.branches],
        }
    show_report(data.intake)
    show_data(data.reports)
    _write(cfg, data, rows, lengths)
    return data


def _character_lengths(data: PreferenceDataModule) -> dict[str, list[int]]:
    records = data.intake.records["train"]
    return {
        "prompt (characters)": [sum(len(turn.content) for turn in messages_of(record.prompt)) for record in records],
        "completion (characters)": [len(c.text) for record in records for c in record.completions],
    }


def _tokenise(data: PreferenceDataModule, cfg: DictConfig) -> None:
    spec: ModelSpec = build(cfg.model)
    tokenizer = spec.tokenizer()
    data.tokenise(tokenizer)
    names = ("chosen", "rejected") if cfg.view == "pairs" else ("completion",)
    for row in data.rows["train"].rows[: cfg.show]:
        show_example(row, tokenizer, names)


def _show(example: Example) -> None:
    console.print(f"[bold]{escape(example.id)}[/]", highlight=False)
    for turn in messages_of(example.prompt):
        console.print(f"  [dim]{turn.role}:[/] {escape(turn.content[:LONGEST_SHOWN])}", highlight=False)
    names = ("chosen", "rejected") if len(texts_of(example)) == 2 else (_name(example),)
    for name, text in zip(names, texts_of(example), strict=True):
        console.print(f"  [bold]{name}:[/] [green]{escape(text[:LONGEST_SHOWN])}[/]", highlight=False)


def _name(example: Example) -> str:
    if isinstance(example, Labelled):
        return "desirable" if example.desirable else "undesirable"
    return f"score {example.score:g}" if isinstance(example, Scored) else "completion"


def _write(
    cfg: DictConfig, data: PreferenceDataModule, rows: list[dict[str, Any]], lengths: dict[str, list[int]]
) -> None:
    if cfg.convert:
        write_jsonl(Path(cfg.convert), rows)
        console.print(f"{len(rows):,} records → [bold]{escape(str(cfg.convert))}[/]", highlight=False)
    if cfg.plot:
        plot_lengths(lengths, Path(cfg.plot))
        console.print(f"lengths → [bold]{escape(str(cfg.plot))}[/]", highlight=False)
    if cfg.output_dir:
        write_report(data.intake, Path(cfg.output_dir))
