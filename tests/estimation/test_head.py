"""The chunks of the LM head on a GPU that is only estimated."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import LlamaConfig

from halos.estimation.head import rows_on
from halos.estimation.step import Batching, backbone_for, trace
from halos.objectives import SFT
from halos.training.gpus import GPUS
from tests.estimation.test_step import SIZES, plan


def test_the_heads_chunks_are_those_that_the_gpu_has_room_for(tmp_path: Path) -> None:
    LlamaConfig(**SIZES).save_pretrained(tmp_path)
    options: dict[str, Any] = {"device": "cuda", "objective": SFT, "batching": Batching(examples=32)}
    plans = (plan(tmp_path, head_chunk=rows, **options) for rows in ("auto", 4096, None))
    auto, most, whole = (trace(made, 4, 200).memory for made in plans)
    assert auto == most != whole
    # Of a GPU whose memory the weights fill, the fewest rows.
    full = replace(GPUS["h100"], gib=0)
    policy = backbone_for(plan(tmp_path)).policy
    assert [rows_on(plan(tmp_path, gpu=gpu), policy) for gpu in (GPUS["h100"], full)] == [4096, 128]
    assert rows_on(plan(tmp_path, head_chunk=77), policy) == 77
