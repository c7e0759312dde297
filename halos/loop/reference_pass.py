"""The Trainer's side of the reference pass: device, precision, progress and cache key.

:mod:`halos.policy.reference.precompute` computes the log-probs.
"""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path

import lightning.pytorch as pl

from halos import terminal
from halos.data.module import PreferenceDataModule
from halos.policy.backbone import Backbone
from halos.policy.checks import check_positions, warn_of_rotary
from halos.policy.logprobs.packed import check_packing
from halos.policy.reference.precompute import reference_table


def check_sequences(backbone: Backbone, data: PreferenceDataModule) -> None:
    """Raise ``ValueError`` if sequences are too long for the policy, or if it cannot read packed rows in parts."""
    warn_of_rotary(backbone.policy.config.get_text_config(), data.preparation.limits.max_length)
    check_positions(backbone.policy, data.prepared.longest())
    if data.max_tokens is not None:
        check_packing(backbone.policy)


def run_reference_pass(scorer: Backbone, data: PreferenceDataModule, trainer: pl.Trainer) -> float:
    """Compute the reference's log-probs of every row that the planned run reads, and store them in ``data.reference``.

    Log-probs that are in the data module's cache folder are read. The others are computed and added to the folder.

    Args:
        scorer: the reference; usually the policy, which is its own reference until its first step.
        data: the data module, prepared and planned.
        trainer: provides the device, the precision and the ranks.

    Returns:
        The duration in seconds.
    """
    precision = trainer.precision_plugin
    if not scorer.sharded:
        # Lightning moves and casts the policy in the same way before the first step.
        precision.convert_module(scorer).to(trainer.strategy.root_device)
    rows = data.rows_read()
    track = partial(terminal.track, "reference log-probs", shown=trainer.progress_bar_callback is not None)
    layout = {"packing": data.packing, "share_prompts": data.share_prompts}
    key = _numbers_key(scorer, trainer)
    with tempfile.TemporaryDirectory() as temporary, precision.forward_context():
        folder = data.cache_dir or Path(temporary)
        data.reference, seconds = reference_table(
            scorer, rows, folder=folder, seals=data.seals, precision=key, track=track, **layout
        )
    return seconds


def _numbers_key(scorer: Backbone, trainer: pl.Trainer) -> str:
    # Part of the cache key. In reduced precision the log-probs also depend on the sharding and on the device type.
    parts = [str(trainer.precision)]
    if parts == ["32-true"]:
        return parts[0]
    if group_size := getattr(trainer.strategy, "tensor_parallel_size", None):
        parts.append(f"tensor parallel {group_size}")
    elif scorer.sharded and trainer.precision == "bf16-mixed":
        parts.append("sharded")  # FSDP casts weights where autocast casts operands
    if scorer.device.type != "cpu":
        parts.append(scorer.device.type)  # where attention is computed in float32
    return ", ".join(parts)
