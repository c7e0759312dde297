"""A page for each loss, from its docstrings, its signature, its YAML, and losses.yaml in this folder."""

from __future__ import annotations

import inspect
import json
import re
from functools import cache, reduce
from operator import or_
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml
from hydra.utils import get_class

from halos.objectives.base import Needs, Objective
from scripts.pages.text import entries, page, parts, table

ROOT = Path(__file__).parents[2]
WRITTEN = "<!-- written by `python scripts/write_docs.py`; change scripts/pages/losses.yaml or the docstring -->"
TOY_RESULTS = ROOT / "benchmarks" / "results" / "toy_losses.json"
"""What ``python -m benchmarks.toy_losses`` measured."""
VIEWS = {
    "binary": (
        "labelled replies: one reply and whether it is desirable",
        '{"prompt": "What is 2+2?", "completion": "4", "label": true}',
    ),
    "pairs": (
        "pairs: a chosen and a rejected reply to the same prompt",
        '{"prompt": "What is 2+2?", "chosen": "4", "rejected": "5"}',
    ),
    "scored": (
        "scored replies; labels count as +1 and −1",
        '{"prompt": "What is 2+2?", "completion": "4", "score": 0.9}',
    ),
    "demonstrations": ("replies to imitate", '{"prompt": "What is 2+2?", "completion": "4"}'),
}
"""What each view is, and a row of a file that gives it."""
SOURCES = {
    "a": "(a): read in the authors' code.",
    "t": "(t): read in TRL's paper index, not in the paper itself.",
}
"""Where values of a paper were read, by their marks in losses.yaml; values without a mark were read in the paper."""
WATCH = {
    "binary": (
        "`val/rewards/auc`: how often a desirable reply has a higher reward than an undesirable one (0.5 is chance)",
        "`val/rewards/margins`",
    ),
    "pairs": (
        "`val/rewards/accuracies`: how often the chosen reply has the higher reward (0.5 is chance)",
        "`val/rewards/margins`",
    ),
    "scored": ("`val/rewards/auc`, where replies have labels (0.5 is chance)",),
    "demonstrations": ("`val/loss`",),
}


@cache
def notes() -> dict[str, dict[str, Any]]:
    """Return what is written by hand, by the name of the loss, in the order of the index."""
    text = Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8")
    return yaml.safe_load(text)


@cache
def settings(name: str) -> dict[str, Any]:
    """Return the keys of ``conf/loss/NAME.yaml``, those of the YAML that it builds on included."""
    own = yaml.safe_load((ROOT / "conf" / "loss" / f"{name}.yaml").read_text(encoding="utf-8"))
    bases = [base for base in own.pop("defaults", []) if base != "_self_"]
    merged: dict[str, Any] = {}
    for base in bases:
        merged |= settings(base)
    return merged | own


def objective(name: str) -> type[Objective]:
    """Return the class of a loss."""
    return get_class(settings(name)["_target_"])


@cache
def described(name: str) -> Objective:
    """Return the objective with the parameters of its YAML, without a backbone."""
    values = {key: value for key, value in settings(name).items() if key not in ("_target_", "name")}
    return objective(name)(None, **values)


def paper(name: str) -> tuple[str, str] | None:
    """Return title and address of a loss's paper: that of losses.yaml for a variant, else that of the class."""
    own = notes()[name].get("title")
    return (own, notes()[name]["address"]) if own else objective(name).paper


def needs(name: str) -> Any:
    """Return the needs of a loss with the parameters of its YAML; those of a mixture's parts, united."""
    if "parts" in (values := settings(name)):
        parts_needs: list[Needs] = [get_class(part["_target_"])(None).needs for part in values["parts"].values()]
        return reduce(or_, parts_needs)
    return described(name).needs


def view(name: str) -> str:
    """Return the view of a loss; the mixtures take pairs."""
    return "pairs" if "parts" in settings(name) else described(name).view


def index_page() -> str:
    """Return the table of all losses."""
    rows = []
    for name in notes():
        source = paper(name)
        link = f"[{source[1].rpartition('/')[2]}]({source[1]})" if source else "–"
        reference = "if a part's" if name == "mix" else "yes" if needs(name).reference else "no"
        measured = (_toy(name, "desirable", 1), _toy(name, "kl", 2))
        rows.append((f"[`{name}`]({name}.md)", VIEWS[view(name)][0], reference, link, *measured))
    return page(
        "# Losses",
        WRITTEN,
        "This page lists all losses. `loss=NAME` chooses one, and nothing else changes. "
        "[Choosing a loss](../guides/choosing-a-loss.md) helps.",
        table(("`loss=`", "data", "reference", "paper", "desirable after, %", "KL, nats"), rows),
        "The last two columns are the mean of three runs on the [toy world](../results/toy-world.md), with seeds 0 to "
        "2, and in brackets the lowest and the highest; nothing but `loss=` and `seed=` is set. *Desirable after* is "
        "the share of replies that the true reward approves of, sampled from the trained policy for 512 held-out "
        f"prompts (the reference: {_toy('kto', 'reference', 1)}). *KL* is KL(policy ‖ reference) per reply. "
        "`python -m benchmarks.toy_losses` repeats them.",
        "They show whether a loss learns with its defaults, and how far three seeds differ, not which is best: the "
        "world is small, and the rates were not searched for each loss. The losses of pairs take the "
        "prompts with both a liked and a disliked reply, about a third of them. PPO and GRPO learn from the replies of "
        "the beginner, on whose replies the reference was pretrained, as their old policy is the reference.",
    )


def loss_page(name: str) -> str:
    """Return the page of one loss, with the same sections for each."""
    note = notes()[name]
    return page(
        f"# {name}",
        WRITTEN,
        *_purpose(name, note),
        "## Equation",
        _equation(name),
        "## Data",
        *_data(name),
        "## How to run it",
        _commands(name),
        "## Metrics to watch",
        [f"- {metric}" for metric in (*note["watch"], *_shared_metrics(name))],
        "[All metrics](../reference/metrics.md), with formulas and signs.",
        "## Deviations from the paper",
        _deviations(name),
        "## Parameters",
        *_parameters(name, note),
        "## Results here",
        _results(name),
        "## Citation",
        _citation(name, note),
    )


def _purpose(name: str, note: dict[str, Any]) -> tuple[str, ...]:
    cls = objective(name)
    source = paper(name)
    link = f" Paper: [{source[0]}]({source[1]})." if source else ""
    file = cls.__module__.replace(".", "/") + ".py"
    code = f"Code: [{file}](../../{file}), the class `halos.{cls.__name__}`."
    return note["purpose"], code + link


def _equation(name: str) -> str:
    if own := notes()[name].get("equation"):
        return _indented(own)
    cls, module = objective(name), inspect.getmodule(objective(name))
    functions = (name, *settings(name)["_target_"].lower().split(".")[-1:], cls.__module__.rpartition(".")[2])
    for function in functions:
        found = getattr(module, f"{function}_loss", None)
        if found is not None and found.__module__ == cls.__module__:
            return _indented(parts(found)[""])
    return _indented(parts(cls)[""].partition("\n\n")[0])


def _indented(text: str) -> str:
    # Two spaces end a line in Markdown: terms that a docstring separates by semicolons stand below each other.
    return "\n".join(f"> {line}  " if line.endswith(";") else f"> {line}".rstrip() for line in text.splitlines())


def _data(name: str) -> tuple[str, ...]:
    meaning, row = VIEWS[view(name)]
    row = notes()[name].get("row", row)
    reference = "does not use" if not needs(name).reference else "needs"
    uses = "uses one if a part does" if name == "mix" else f"{reference} one"
    return (
        f"It takes {meaning}. Other [layouts](../data.md) are converted where that is possible, and what was converted "
        "is counted in the report.",
        f"```json\n{row}\n```",
        f"Reference: the loss {uses}.",
    )


def _commands(name: str) -> str:
    first, file = f"python scripts/train.py loss={name}  # on the toy world", "train.jsonl"
    if needs(name).step_labels:  # which the toy world has not
        first, file = notes()[name]["file"], "steps.jsonl"
    return (
        f"```bash\n{first}\n"
        f"python scripts/train.py loss={name} data.train={file} model.path=path-or-id data.val_size=2\n```"
    )


def _shared_metrics(name: str) -> tuple[str, ...]:
    kind = view(name)
    chosen = "`train/rewards/chosen` and `train/rewards/rejected`: the implied rewards of both kinds"
    shared = WATCH["demonstrations"] if name in ("sft", "csft") else (chosen, *WATCH[kind])
    ratios = "`train/log_ratio/chosen` and `train/log_ratio/rejected`: mean log-ratios of both kinds on the data"
    compared = "reference" if needs(name).reference else "the model that training started from"
    kl = f"`val/kl`: KL(policy ‖ {compared}), estimated from the policy's own samples"
    samples = (kl,) if objective(name).generates else ()
    return (*shared, *((ratios,) if needs(name).reference else ()), *samples)


def _deviations(name: str) -> list[str] | str:
    if own := notes()[name].get("deviations"):
        return [f"{number}. {text}" for number, text in enumerate(own, 1)]
    found = entries(parts(objective(name)).get("Deviations", ""))
    none = "The deviations of its parts hold here too." if "parts" in settings(name) else "None are known."
    none = none if paper(name) else "There is no paper for this loss."
    return [f"{number}. {text}" for number, text in found.items()] or none


def _parameters(name: str, note: dict[str, Any]) -> tuple[str | list[str], ...]:
    meanings = entries(parts(objective(name)).get("Args", ""))
    keys = [key for key in settings(name) if key not in ("_target_", "name")]
    rows = [
        (f"`loss.{key}`", f"`{_value(settings(name)[key])}`", meanings.get(key, ""), note["paper"].get(key, ""))
        for key in keys
    ]
    listed = table(("key", "default", "meaning", "in the paper"), rows) if rows else "It has none."
    training = f"Training in the paper: {note['training']}." if "training" in note else ""
    values = " ".join(map(str, (*note["paper"].values(), note.get("training", ""))))
    sources = " ".join(text for mark, text in SOURCES.items() if re.search(rf"\({mark}\b", values))
    return listed, training, sources


def _value(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(value)
    return str(value).lower() if isinstance(value, bool) else str(value)


def _results(name: str) -> str:
    if name == "bradley_terry":
        accuracy = _toy(name, "accuracy", 1)
        return f"On the toy world, three runs with seeds 0 to 2: {accuracy} % of the held-out pairs in the right order."
    if needs(name).step_labels:
        return "None: the toy world has no labels of steps."
    desirable, reference, kl = _toy(name, "desirable", 1), _toy(name, "reference", 1), _toy(name, "kl", 2)
    return (
        "On the [toy world](../results/toy-world.md), three runs with seeds 0 to 2 (mean, lowest–highest): desirable "
        f"replies {desirable} % (the reference: {reference}), KL {kl} nats. "
        f"`python scripts/train.py -m loss={name} seed=0,1,2` repeats them."
    )


@cache
def _toy_results() -> dict[str, dict[str, list[float]]]:
    return json.loads(TOY_RESULTS.read_text(encoding="utf-8"))


def _toy(name: str, what: str, digits: int) -> str:
    """Return mean, lowest and highest of a loss's runs on the toy world, or a dash without runs."""
    values = _toy_results().get(name, {}).get(what)
    if values is None:
        return "–"
    mean, *ends = (f"{value:.{digits}f}" for value in (fmean(values), min(values), max(values)))
    return f"{mean} ({'–'.join(ends)})"


def _citation(name: str, note: dict[str, Any]) -> str:
    source = paper(name)
    if not source:
        return "There is no paper for this loss."
    title, address = source
    lines = (
        f"@article{{{note['author'].partition(',')[0].lower().replace(chr(39), '')}{note['year']},",
        f"  title = {{{title}}},",
        f"  author = {{{note['author']} and others}},",
        f"  journal = {{arXiv preprint arXiv:{address.rpartition('/')[2]}}},",
        f"  year = {{{note['year']}}}",
        "}",
    )
    return "\n".join(("```bibtex", *lines, "```"))
