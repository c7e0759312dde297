"""``python -m benchmarks.decoding MODEL``: tokens that are sampled a second, next to ``generate`` of transformers.

The toy world's prompts, several samples of each, in one batch and on one thread. Three ways alternate in one process:
``sample`` of halos, ``generate`` on the model as transformers loads it, and ``generate`` on the model with the CPU
kernels of halos. Times are CPU seconds: other processes change them less than elapsed time. The last two lines
are floors of a step: reading all weights once, and the products of all linear layers with the whole batch.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from time import process_time
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig

from benchmarks.table import table
from halos.data.rows.chat_tokens import ChatTokens, Limits
from halos.policy.loading import ModelSpec
from halos.sampling.decoding import left_padded
from halos.sampling.generate import sample, through_end
from halos.toy.source import ToySource

Ids = list[list[int]]


def main() -> None:
    """Measure one model and print the table."""
    parser = argparse.ArgumentParser("benchmarks.decoding", description=__doc__)
    parser.add_argument("model", help="a hub id, a directory, a .gguf file or pkg://halos.toy/reference")
    for name, default in (("prompts", 8), ("samples", 4), ("tokens", 48), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default {default}")
    options = parser.parse_args()
    torch.set_num_threads(1)
    ours, plain = (ModelSpec(path=options.model, cpu_kernels=kernels).load().eval() for kernels in (True, False))
    tokens = ChatTokens(ModelSpec(path=options.model).tokenizer(), Limits(512))
    records = ToySource(size=options.prompts).train().records
    prompts = [tokens.fitted_prompt(record.prompt) for record in records for _ in range(options.samples)]
    lengths = {"end_of_turn": tokens.end_of_turn, "pad": tokens.pad, "max_new_tokens": options.tokens}
    ways: dict[str, Callable[[], Ids]] = {
        "sample of halos": lambda: sample(ours, prompts, **lengths),
        "generate of transformers": lambda: generate(plain, prompts, **lengths),
        "generate, with our CPU kernels": lambda: generate(ours, prompts, **lengths),
    }
    print(report(ways, options.rounds))
    floors = {"reading the weights": weights_seconds(ours), "products": products_seconds(ours, len(prompts))}
    print("\nof one step: " + "; ".join(f"{name} {1000 * seconds:.2f} ms" for name, seconds in floors.items()))


def report(ways: dict[str, Callable[[], Ids]], rounds: int) -> str:
    """Run the ways in turn, and return a table of their rounds."""
    speeds: dict[str, list[float]] = {name: [] for name in ways}
    facts: dict[str, tuple[int, int, float]] = {}
    for number in range(rounds + 1):
        for name, way in ways.items():
            start = process_time()
            said = way()
            seconds = process_time() - start
            count = sum(map(len, said))
            if number:  # the first warms up
                speeds[name].append(count / seconds)
                facts[name] = count, max(map(len, said)), 1000 * seconds / max(map(len, said))
    rows = [
        (name, *map(str, facts[name][:2]), f"{facts[name][2]:.1f}", ", ".join(f"{speed:.0f}" for speed in values))
        for name, values in speeds.items()
    ]
    return table(("", "tokens", "steps", "ms a step, prompts included", "tokens/s"), rows)


@torch.no_grad()
def generate(model: Any, prompts: Ids, *, end_of_turn: int, pad: int, max_new_tokens: int) -> Ids:
    """Sample at temperature 1 with ``generate``; returns completions with their end-of-turn tokens."""
    ids, mask = left_padded(prompts, pad, model.device)
    config = GenerationConfig(
        do_sample=True, top_k=0, max_new_tokens=max_new_tokens, eos_token_id=end_of_turn, pad_token_id=pad
    )
    output = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)[:, ids.shape[1] :].tolist()
    return [through_end(row, end_of_turn) for row in output]


def weights_seconds(model: nn.Module) -> float:
    """The shortest time to read as many bytes as all weights have, from memory that no cache holds."""
    buffer = torch.ones(64 * 2**20)
    count = sum(parameter.numel() for parameter in model.parameters())
    return _shortest(buffer.sum) * count / buffer.numel()


@torch.no_grad()
def products_seconds(model: nn.Module, rows: int) -> float:
    """The shortest time of all linear layers with one state of each completion."""
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    states = {layer.in_features: torch.randn(rows, 1, layer.in_features) for layer in layers}
    return _shortest(lambda: [layer(states[layer.in_features]) for layer in layers])


def _shortest(run: Callable[[], object]) -> float:
    seconds = []
    for _ in range(5):
        start = process_time()
        run()
        seconds.append(process_time() - start)
    return min(seconds)


if __name__ == "__main__":
    main()
