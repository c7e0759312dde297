"""The parts of the benchmark: each runs its jobs and gives a piece of the report."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks import contest, inputs, profile_table
from benchmarks.plan import Plan
from benchmarks.runner import Result
from benchmarks.table import number, table

SWEEP = ("kto", "dpo", "ipo", "apo_zero", "simpo", "orpo")
VOCABULARIES = (32_768, 131_072, 262_144)
COMPLETIONS = (128, 512)
CURVES: dict[str, tuple[int, ...]] = {
    "prompt": (32, 128, 512),
    "completion": (16, 64, 256),
    "per_prompt": (1, 2, 4, 8),
    "vocabulary": (8_192, 32_768, 131_072),
}
CURVE = {"hidden": 256, "layers": 4, "prompt": 128, "completion": 64, "per_prompt": 2, "vocabulary": 32_768}
"""The point that all curves pass through."""


def profile(plan: Plan) -> str:
    """Where the time of a step goes, with one thread and with ``--threads`` threads."""
    cases = []
    for case in plan.cases():
        job = replace(case, kind="profile")
        alone = plan.runner.run(plan.cold(replace(job, threads=1)))
        together = plan.runner.run(plan.cold(job)) if job.threads > 1 else None
        cases.append((f"{case.loss}, {case.precision}", alone, together))
    return profile_table.section(cases)


def memory(plan: Plan) -> str:
    """Peak memory beyond weights, gradients and optimizer state, for growing vocabularies and completions."""
    rows = []
    for completion, vocabulary in product(COMPLETIONS, VOCABULARIES):
        model = inputs.synthetic_model(plan.folder, hidden=64, layers=2, vocabulary=vocabulary)
        sizes = {"prompt": 32, "completion": completion, "vocabulary": vocabulary}
        data = inputs.synthetic_pairs(plan.folder, count=4, **sizes)
        found = []
        for chunk in (plan.base.head_chunk, None):
            job = replace(plan.base, loss="dpo", model=model, data=data, head_chunk=chunk, batch_size=2)
            result = plan.runner.run(replace(job, max_length=1024, max_prompt_length=None))
            found.append("failed" if result is None else f"{beyond_weights_mb(result):,.0f}")
        rows.append(
            [f"{vocabulary:,}", f"{4 * completion:,}", *found, f"{vocabulary * 4 * completion * 4 / 2**20:,.0f}"]
        )
    heads = ("vocabulary", "scored tokens", f"MiB, head_chunk={plan.base.head_chunk}", "MiB, head_chunk=null")
    return table((*heads, "logits in float32, MiB"), rows)


def beyond_weights_mb(result: Result) -> float:
    """Peak memory less what the process had before the model, and less weights, gradients and AdamW's two moments."""
    return float(result["peak_mb"] - result["before_mb"] - 4 * 4 * result["parameters"] / 2**20)


def curves(plan: Plan) -> str:
    """Cost of an example against its sizes."""
    rows, drawn = [], {}
    for name, values in CURVES.items():
        points = []
        for value in values:
            shape = tuple(sorted((CURVE | {name: value}).items()))
            job = replace(plan.base, kind="cost", precision=plan.precisions[0], shape=shape, model="", data="")
            result = plan.runner.run(job)
            if result:
                points.append((value, result["ours"], result["plain"]))
                ratio = result["plain"] / result["ours"]
                rows.append(
                    [name.replace("_", " "), f"{value:,}", *(f"{1000 * s:.1f}" for s in points[-1][1:]), number(ratio)]
                )
        drawn[name] = points
    draw(drawn, plan.folder / "costs.png")
    heads = ("varied", "value", "ours, ms/example", "plain, ms/example", "ratio")
    told = ", ".join(f"{name.replace('_', ' ')} {value:,}" for name, value in CURVE.items())
    return f"{table(heads, rows)}\n\nKTO at {plan.precisions[0]}; all else: {told}. Figure: costs.png"


def draw(drawn: dict[str, list[tuple[int, float, float]]], file: Path) -> None:
    """One panel for each curve, both axes logarithmic."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.2 * len(drawn), 3), layout="constrained")
    FigureCanvasAgg(figure)
    axes: Any = figure.subplots(1, len(drawn), sharey=True, squeeze=False)[0]
    for axis, (name, points) in zip(axes, drawn.items(), strict=True):
        for column, who in ((2, "plain"), (1, "ours")):
            axis.plot([p[0] for p in points], [1000 * p[column] for p in points], marker="o", label=who)
        axis.set(xscale="log", yscale="log", xlabel=name.replace("_", " "))
    axes[0].set_ylabel("ms per example")
    axes[0].legend()
    figure.savefig(file, dpi=150)


def sweep(plan: Plan) -> str:
    """Six objectives over the same data: ours share one reference, TRL's runs are separate."""
    rows = []
    for precision in plan.precisions:
        totals: dict[str, list[float]] = {"ours": [], "trl": []}
        cache = str(plan.folder / "cache" / f"sweep-{precision}-{plan.base.name('')[-12:]}")
        for number_, loss in enumerate(SWEEP):
            job = replace(plan.base, loss=loss, precision=precision, cache=cache, repeat=3000 + number_)
            seconds = [plan.runner.run(job)]
            if "trl" in plan.peers:
                seconds.append(plan.runner.run(replace(job, who="trl", cache="", repeat=0)))
            told = []
            for who, result in zip(totals, seconds, strict=False):
                totals[who].append(result["seconds"] if result else float("nan"))
                told.append("failed" if result is None else f"{result['seconds']:.1f}")
            reference = "" if seconds[0] is None else f"{seconds[0]['reference_seconds']:.1f}"
            rows.append([precision, loss, *told, *[""] * (2 - len(told)), reference])
        summed = [f"{sum(values):.1f}" if values else "" for values in totals.values()]
        rows.append([precision, "**total**", *summed, ""])
    return table(("precision", "loss", "ours, s", "TRL, s", "of ours: the reference, s"), rows) + "\n\n" + SWEEP_NOTES


SWEEP_NOTES = (
    "One after the other, over the same data: ours find the reference's log-probs that earlier ones computed. TRL's "
    "ORPO also trains on the prompt's tokens."
)


SECTIONS: dict[str, Callable[[Plan], str]] = {
    "speed": contest.speed,
    "profile": profile,
    "memory": memory,
    "curves": curves,
    "sweep": sweep,
}


def planned(name: str, plan: Plan) -> int:
    """How many jobs a section has, at most."""
    cases = len(plan.losses) * len(plan.precisions)
    return {
        "speed": cases * (plan.repeats * (3 + len(plan.peers)) + 2),
        "profile": cases * (1 + (plan.base.threads > 1)),
        "memory": len(VOCABULARIES) * len(COMPLETIONS) * 2,
        "curves": sum(map(len, CURVES.values())),
        "sweep": len(plan.precisions) * len(SWEEP) * (1 + ("trl" in plan.peers)),
    }[name]
