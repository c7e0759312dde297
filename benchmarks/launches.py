"""``python -m benchmarks.launches``: kernels that a GPU would launch in an optimizer step, and what its host waits for.

Counted on a CPU, on a random Llama that needs no memory to speak of: the numbers depend on layers and rows, and hardly
on widths. FlexAttention has no backward pass on CPUs, and variable-length attention does not exist there; one fused
call with a dense mask stands in for each kernel.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any
from unittest.mock import patch

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.data import DataLoader

from benchmarks.costs import rows_of
from benchmarks.inputs import llama
from benchmarks.table import table
from halos.data.batches.collate import Batches, collate
from halos.data.batches.order import MicroBatch
from halos.objectives import DPO, KTO, SFT, Objective
from halos.policy.backbone import Backbone
from halos.policy.logprobs import flex, varlen
from halos.policy.logprobs.packed import attend_by
from halos.testing.device_work import DeviceWork, watched

LOSSES: dict[str, type[Objective]] = {"sft": SFT, "dpo": DPO, "kto": KTO}
FORMS = ("pieces", "flex", "varlen", "padded")
STEPS = 3
COUNTED = 2
"""The second step: the first one tries out what the model can do, and the last one is logged."""


def main(words: Sequence[str] | None = None) -> None:
    """Print the tables for each loss and form of rows."""
    made = argparse.ArgumentParser("benchmarks.launches", description=__doc__)
    for name, default in (("layers", 2), ("examples", 8), ("prompt", 120), ("completion", 60)):
        made.add_argument(f"--{name}", type=int, default=default, help=f"default {default}")
    made.add_argument("--losses", nargs="+", choices=LOSSES, default=list(LOSSES))
    options = made.parse_args(words)
    sizes = {"examples": options.examples, "prompt": options.prompt, "completion": options.completion}
    works = {}
    for loss in options.losses:
        for form in FORMS:
            works[loss, form] = step(loss, form, options.layers, **sizes)
            print(f"{loss}, {form}: {works[loss, form].kernels.total():,}", flush=True)
    print(totals(works))
    loss = options.losses[-1]
    print(f"\nThe most frequent operations of {loss}:\n")
    print(frequent({form: works[loss, form] for form in FORMS}))


def step(loss: str, form: str, layers: int, **sizes: int) -> DeviceWork:
    """What one optimizer step asks of its device, with a live reference where the loss has one."""
    from transformers import LlamaForCausalLM, set_seed

    set_seed(0)
    kind = LOSSES[loss]
    policy = LlamaForCausalLM(llama(hidden=64, layers=layers, vocabulary=512))
    backbone = Backbone(policy, with_reference=kind().needs.reference, head_chunk=512)
    objective = kind(backbone)
    if form != "padded":
        for member in backbone.with_reference_backbone():
            attend_by(member.policy, form)
    rows = rows_of(**sizes, per_prompt=2, vocabulary=512)
    options: dict[str, Any] = {"mismatched": kind().needs.mismatched, "packing": form != "padded", "chunks": 4}
    order = [MicroBatch(tuple(range(len(rows))), tuple(range(len(rows))))] * STEPS
    loader = DataLoader(Batches(rows, partial(collate, **options)), sampler=order, batch_size=None)
    by_flex, by_varlen = patch.object(flex, "_flex_function", _flex), patch.object(varlen, "_varlen_function", _varlen)
    with by_flex, by_varlen, watched() as work:
        counter = _Counter(work)
        _trainer(counter).fit(objective, loader)
    return counter.steps[COUNTED - 1]


class _Counter(Callback):
    def __init__(self, work: DeviceWork) -> None:
        self.work, self.steps = work, list[DeviceWork]()

    def on_train_batch_start(self, *_: Any) -> None:
        self.work.take()

    def on_train_batch_end(self, *_: Any) -> None:
        self.steps.append(self.work.take())


def _trainer(callback: Callback) -> pl.Trainer:
    quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    off: dict[str, Any] = dict.fromkeys(quiet, False)
    return pl.Trainer(
        accelerator="cpu", max_epochs=1, callbacks=[callback], log_every_n_steps=STEPS, gradient_clip_val=1.0, **off
    )


def _flex(device: str) -> Callable[..., Tensor]:
    def attend(query: Tensor, key: Tensor, value: Tensor, *, block_mask: Any, scale: Any, **_: Any) -> Tensor:
        if not hasattr(block_mask, "dense"):
            # Not counted: on CUDA blocks are skipped, and the mask is a part of the kernel.
            with _disable_current_modes():
                zero, queries, keys = (torch.arange(n) for n in (1, query.shape[2], key.shape[2]))
                block_mask.dense = block_mask.mask_mod(zero, zero, queries[:, None], keys[None])
        return scaled_dot_product_attention(query, key, value, block_mask.dense, scale=scale)

    return attend


def _varlen() -> Callable[..., Tensor]:
    def attend(
        query: Tensor, key: Tensor, value: Tensor, query_edges: Tensor, key_edges: Tensor, *_: int, **options: Any
    ) -> Tensor:
        with _disable_current_modes():  # not counted, as above
            mask = _causal_at_the_end(query_edges, key_edges)
        query, key, value = (states.transpose(0, 1)[None] for states in (query, key, value))
        return scaled_dot_product_attention(query, key, value, mask, scale=options["scale"])[0].transpose(0, 1)

    return attend


def _causal_at_the_end(query_edges: Tensor, key_edges: Tensor) -> Tensor:
    """Which keys each query sees [queries, keys]: the last one of a sequence sees all keys of that sequence."""
    queries, keys = (torch.arange(int(edges[-1])) for edges in (query_edges, key_edges))
    own, other = (torch.bucketize(n, edges[1:], right=True) for n, edges in ((queries, query_edges), (keys, key_edges)))
    left = query_edges[1:][own] - queries  # queries to the end of the sequence, this one among them
    return (own[:, None] == other) & (key_edges[1:][other] - keys >= left[:, None])


def totals(works: dict[tuple[str, str], DeviceWork]) -> str:
    """Kernels and waits of each loss and form."""
    rows = [[loss, form, f"{work.kernels.total():,}", str(len(work.waits))] for (loss, form), work in works.items()]
    return table(("loss", "rows", "kernels in a step", "waits"), rows)


def frequent(works: dict[str, DeviceWork], most: int = 12) -> str:
    """How often each form launches its most frequent operations."""
    names = dict.fromkeys(name for work in works.values() for name, _ in work.kernels.most_common(most))
    return table(
        ("operation", *works), [[name, *(f"{work.kernels[name]:,}" for work in works.values())] for name in names]
    )


if __name__ == "__main__":
    main()
