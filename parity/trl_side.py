"""Losses and gradients from TRL's trainers: their collators, forwards, reductions; only the token ids are given."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

from datasets import Dataset
from torch import Tensor
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from halos.data.rows.token_rows import Row
from parity.case import Case, measure
from tests import tiny


def kto(case: Case, rows: Sequence[Row], **options: Any) -> tuple[Tensor, float]:
    """``KTOTrainer`` on (y, y') and labels, and the z₀ that it logs."""
    features = [
        {
            "prompt_ids": list(row.prompt),
            "completion_ids": list(row.branches[0]),
            "KL_completion_ids": list(row.branches[1]),
            "label": row.desirable,
        }
        for row in rows
    ]
    data = [{"prompt": "a", "completion": "b", "label": label} for label in (True, False)]
    trainer = with_reference(KTOTrainer, KTOConfig, case, data, options)
    return evaluate(trainer, features), trainer._metrics["train"]["kl"][-1]


def dpo(case: Case, rows: Sequence[Row], **options: Any) -> Tensor:
    """``DPOTrainer`` on pairs."""
    return evaluate(dpo_trainer(case, **options), pair_features(rows))


def bco(case: Case, rows: Sequence[Row], *, beta: float) -> tuple[Tensor, float]:
    """``DPOTrainer`` with ``bco_pair``, whose reward shift is 0, on rewards that are shifted by δ; and δ.

    δ is half the sum of the mean rewards that the trainer logs for chosen and for rejected completions. Its reference
    gets log π_ref + δ/β, so its rewards β(log π_θ − log π_ref) fall by δ.
    """
    trainer, features = dpo_trainer(case, beta=beta, loss_type="bco_pair"), pair_features(rows)
    evaluate(trainer, features)
    delta = sum(trainer._metrics["train"][f"rewards/{side}"][-1] for side in ("chosen", "rejected")) / 2
    chosen, rejected = trainer.compute_ref_log_probs(trainer.ref_model, trainer.data_collator(features))
    trainer.precompute_ref_logps = True
    shifted = {"ref_chosen_logps": chosen + delta / beta, "ref_rejected_logps": rejected + delta / beta}
    return evaluate(trainer, features, **shifted), delta


def dpo_trainer(case: Case, **options: Any) -> DPOTrainer:
    return with_reference(DPOTrainer, DPOConfig, case, PAIRS, options)


def pair_features(rows: Sequence[Row]) -> list[dict[str, Any]]:
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    return [dict(zip(names, map(list, (row.prompt, *row.branches)), strict=True)) for row in rows]


def cpo(case: Case, rows: Sequence[Row], **options: Any) -> Tensor:
    """``CPOTrainer`` on pairs."""
    return without_reference(CPOTrainer, CPOConfig, case, rows, options)


def orpo(case: Case, rows: Sequence[Row], **options: Any) -> Tensor:
    """``ORPOTrainer`` on pairs."""
    return without_reference(ORPOTrainer, ORPOConfig, case, rows, options)


PAIRS = [{"prompt": "a", "chosen": "b", "rejected": "c"}]
"""Trainers want a data set; what is compared never comes from it."""


def with_reference(trainer: Any, config: Any, case: Case, data: list[dict[str, Any]], options: dict[str, Any]) -> Any:
    return trainer(ref_model=deepcopy(case.backbone.reference), **common(config, case, data, options))


def without_reference(trainer: Any, config: Any, case: Case, rows: Sequence[Row], options: dict[str, Any]) -> Tensor:
    features = []
    for row in rows:
        feature: dict[str, Any] = {}
        for side, branch in zip(("chosen", "rejected"), row.branches, strict=True):
            ids = [*row.prompt, *branch]
            feature[f"{side}_input_ids"], feature[f"{side}_attention_mask"] = ids, [1] * len(ids)
            feature[f"{side}_labels"] = [-100] * len(row.prompt) + list(branch)
        features.append(feature)
    return evaluate(trainer(**common(config, case, PAIRS, options)), features)


def common(config: Any, case: Case, data: list[dict[str, Any]], options: dict[str, Any]) -> dict[str, Any]:
    plain = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": "none"}
    return {
        "model": deepcopy(case.backbone.policy),
        "args": config(str(case.folder), **plain, **options),
        "train_dataset": Dataset.from_list(data),
        "processing_class": tiny.word_tokenizer(),
    }


def evaluate(trainer: Any, features: list[dict[str, Any]], **more: Any) -> Tensor:
    """The trainer's loss of one batch, collated by itself, with gradient; ``more`` joins the batch."""
    inputs = trainer.data_collator(features) | more
    return measure(trainer.compute_loss(trainer.model, inputs), trainer.model)
