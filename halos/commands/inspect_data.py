"""``inspect_data(cfg)``: shows what is in the data and what is wrong with it, without training."""

from collections.abc import Iterable
from pathlib import Path

from omegaconf import DictConfig

from halos.caches import Seals
from halos.commands.propose import write_proposal
from halos.config.nodes import build
from halos.data.preparation.intake import Intake
from halos.data.preparation.needs import DataNeeds, RowNeeds
from halos.data.preparation.prepare import Preparation
from halos.data.preparation.writing import example_row, record_row, write_jsonl
from halos.data.reading.lines import ReadingLimits
from halos.data.records.record import Conversation, messages_of, reply_text
from halos.data.rows.chat_tokens import Limits
from halos.data.rows.tokenise import replies_of
from halos.data.store.arrow import Store, cache_folder
from halos.data.views.derive import VIEWS
from halos.data.views.examples import Example, Labelled, Scored
from halos.reporting.data_report import plot_lengths, show_data, show_example, show_report, write_report
from halos.terminal import console, set_up_logging, styled

LONGEST_SHOWN = 400
"""The maximum number of characters of a text that are shown."""


def inspect_data(cfg: DictConfig) -> Intake | None:
    """Read and show the configured data, and write the files that ``cfg.convert``, ``plot`` and ``output_dir`` ask for.

    With ``cfg.propose``, only propose a mapping of the columns.

    Returns:
        What was read; None after a proposal.

    Raises:
        ValueError: bad data or settings.
    """
    set_up_logging(models=cfg.model.path is not None)
    if cfg.view is not None and cfg.view not in VIEWS:
        raise ValueError(f"view: expected one of {', '.join(VIEWS)} or null, found {cfg.view!r}")
    tokens = cfg.model.path is not None
    if tokens and cfg.view is None:
        raise ValueError("model.path: expected a view whose examples to tokenise, found view=null; set view=binary")
    if cfg.propose is not None:
        write_proposal(cfg)
        return None
    preparation = preparation_of(cfg)
    intake = preparation.read()
    records = intake.records["train"]
    written: Iterable[dict[str, object]] = map(record_row, records)
    lengths = {
        "prompt (characters)": records.numbers("prompt_characters"),
        "completion (characters)": records.lists("completion_characters")[1],
    }
    if cfg.view is not None:
        steps = cfg.view == "steps"
        needs = DataNeeds(view="binary" if steps else cfg.view, flags=RowNeeds(step_labels=steps))
        preparation.derive(intake, needs)
        (examples,) = intake.examples["train"].views
        written = map(example_row, examples)
        for example in () if tokens else examples[: cfg.show]:  # with a tokenizer they are shown decoded
            _show(example)
    if tokens:
        tokenizer = build(cfg.model).tokenizer()
        preparation.leave_out_steps(intake, needs, tokenizer)
        rows = preparation.tokenise(intake, needs, tokenizer)["train"]
        for row in rows.table[: cfg.show]:
            show_example(row, tokenizer, ("chosen", "rejected") if cfg.view == "pairs" else ("completion",))
        lengths = rows.lengths
    show_report(intake)
    show_data(intake.reports)
    if cfg.convert:
        count = write_jsonl(Path(cfg.convert), written)
        console.print(styled(f"{count:,} rows → ", (str(cfg.convert), "bold")))
    if cfg.plot:
        plot_lengths(lengths, Path(cfg.plot))
        console.print(styled("lengths → ", (str(cfg.plot), "bold")))
    if cfg.output_dir:
        write_report(intake, Path(cfg.output_dir))
    return intake


def preparation_of(cfg: DictConfig) -> Preparation:
    """Build the preparation of ``cfg.data`` without a DataModule, which would import torch and Lightning."""
    node = cfg.data
    if node.streaming:
        from halos.commands.builders import build_data

        return build_data(node, seed=cfg.seed, cache_dir=cfg.cache_dir, cache_key_file=cfg.cache_key_file).preparation
    names = ("max_examples", "max_val_examples", "val_size", "strict", "train_on", "text")
    return Preparation(
        source=build(node.source),
        limits=Limits(node.max_length, node.max_prompt_length),
        selection=build(node.select),
        store=Store(cache_folder(cfg.cache_dir), node.num_proc, Seals.of_file(cfg.cache_key_file)),
        reading=ReadingLimits(node.max_expansion, node.max_characters),
        seed=cfg.seed,
        **{name: node[name] for name in names},
    )


def _show(example: Example) -> None:
    console.print(styled((example.id, "bold")))
    prompt = example.prompt
    lines = [(turn.role, turn.text) for turn in messages_of(prompt)]
    if isinstance(prompt, Conversation):
        lines = [("tools", prompt.tools), ("chat_template_kwargs", prompt.template_kwargs), *lines]
    for name, text in lines:
        if text:
            console.print(styled((f"  {name}:", "dim"), f" {text[:LONGEST_SHOWN]}"))
    texts = list(map(reply_text, replies_of(example)))
    if isinstance(example, Labelled) and example.step is not None:
        texts = [texts[0][slice(*example.step)]]
    for name, text in zip(("chosen", "rejected") if len(texts) == 2 else (_name(example),), texts, strict=True):
        console.print(styled((f"  {name}:", "bold"), " ", (text[:LONGEST_SHOWN], "green")))


def _name(example: Example) -> str:
    if isinstance(example, Labelled):
        label = "desirable" if example.desirable else "undesirable"
        return label if example.step is None else f"{label} step"
    return f"score {example.score:g}" if isinstance(example, Scored) else "completion"
