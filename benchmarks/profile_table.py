"""The table of a profile: parts that add up to a step, next to the least time for their operations and bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.operation_costs import PRODUCTS
from benchmarks.table import table

PROFILE = ("part of a step", "s", "share", "least, s", "ms a layer")
IN_LAYERS = ("products", "attention", "elementwise operations and copies", "pieces of attention", "conversions")
"""Causes whose time is in the layers, once the head's products are subtracted. Other work of the head is little."""
REST, BETWEEN = "data, Lightning, metrics and logging", "Python and autograd between operations"
MEMORY, WAITING, UNEXPLAINED = "new memory", "threads that wait for each other", "unexplained"
NOTES = (
    "*Least*: for products and attention, their operations at the average rate that this machine reaches for products "
    "of these sizes; for all else, the bytes at its memory bandwidth. *Ms a layer*: milliseconds for each layer, "
    "without the products of the head. *New memory*: the number of page faults times the time of one; the rows above "
    "do not include it. *Unexplained*: the step without measuring, less all parts; it is negative if operations take "
    "longer while they are measured. *First pass*: the additional time of a batch's first pass. oneDNN then generates "
    "code for new sizes of products, and new memory is used, most of it in the first step of a process."
)


def parts(result: Mapping[str, Any]) -> dict[str, float]:
    """Seconds of each part of a step, without the time that measuring adds."""
    causes, between, overhead = result["causes"], result["between"], result["overhead"]
    fault = result["fault_seconds"]
    found = {name: cost["seconds"] - fault * cost["faults"] for name, cost in causes.items()}
    found = dict(sorted(found.items(), key=lambda item: -item[1]))
    calls = sum(cost["calls"] for cost in causes.values())
    added = overhead["operation"] * calls + overhead["view"] * result["views"]
    faults = result["faults"] - sum(cost["faults"] for cost in causes.values())
    found[BETWEEN] = sum(between.values()) - between.get("rest", 0.0) - added - fault * faults
    return found | {REST: between.get("rest", 0.0), MEMORY: fault * result["faults"]}


def with_waiting(alone: Mapping[str, float], together: Mapping[str, float], threads: int) -> dict[str, float]:
    """Parts of a step with several threads. The time that is lost by dividing operations is a part of its own."""
    apart = (BETWEEN, REST, MEMORY)
    found = {name: seconds if name in apart else alone[name] / threads for name, seconds in together.items()}
    lost = sum(seconds - found[name] for name, seconds in together.items())
    return found | {WAITING: lost}


def rows_of(result: Mapping[str, Any], found: Mapping[str, float], threads: int = 1) -> list[list[str]]:
    """Rows of a profile. ``found``: the seconds of its parts."""
    step = result["seconds"]["again"]
    least = result["roofline"]["least"]
    outside = {"products": sum(result["names"].get(f"head: {name}", 0.0) for name in PRODUCTS)}
    found = {**found, UNEXPLAINED: step - sum(found.values())}
    rows = [
        [
            *(name, f"{seconds:.3f}", f"{seconds / step:.1%}"),
            f"{least[name]:.3f}" if name in least else "",
            f"{1000 * (seconds - outside.get(name, 0.0)) / result['layers']:.1f}" if name in IN_LAYERS else "",
        ]
        for name, seconds in found.items()
    ]
    total = sum(least.values())
    first = result["seconds"]["first"] - step
    return [
        *rows,
        ["**step**", f"{step:.3f}", "100%", f"{total:.3f} ({total / step:.0%})", ""],
        ["first pass", f"{first:+.3f}", f"{first / step:+.1%}", "", ""],
    ]


def section(cases: Sequence[tuple[str, Mapping[str, Any] | None, Mapping[str, Any] | None]]) -> str:
    """Tables of the cases. A case has a title, the result with one thread, and that with several threads or None."""
    texts = []
    for title, alone, together in cases:
        if alone is None:
            continue
        rates = f"{alone['roofline']['rate'] / 1e9:.0f} GFLOP/s, {alone['roofline']['bandwidth'] / 1e9:.0f} GB/s"
        texts.append(f"**{title}, one thread** ({rates}):\n\n{table(PROFILE, rows_of(alone, parts(alone)))}")
        if together is not None:
            threads = together["threads"]
            divided = with_waiting(parts(alone), parts(together), threads)
            texts.append(f"**{title}, {threads} threads**:\n\n{table(PROFILE, rows_of(together, divided))}")
    return "\n\n".join([*texts, NOTES])
