"""TRL's own trainers on the same token ids, in the same order, with the same y'.

Defaults apart from these: no gradient checkpointing (it trades time for memory; ours is off too), every step logged as
ours are, no checkpoints, no reports. The reference is live, as is TRL's default.

There are three contestants: ``trl`` as it is installed; ``trl_lean``, patched so that it computes only the log-probs
that the loss needs; and ``trl_best``, which is TRL as fast as patches from outside make it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

from halos.data.rows.token_rows import Row
from halos.policy.kernels.cpu import use_cpu_kernels

OF_DPO = {"dpo": "sigmoid", "ipo": "ipo", "apo_zero": "apo_zero", "apo_down": "apo_down", "robust_dpo": "robust"}
LOSSES = ("kto", *OF_DPO, "simpo", "cpo", "orpo")
"""The losses that TRL has a trainer for."""
PAIR = {"prompt": "w2", "chosen": "w3", "rejected": "w4"}
"""Trainers want a data set of text to tokenise; ours, of token ids, then takes its place."""


def trainer(
    loss: str, rows: Sequence[Row], *, model: Any, tokenizer: Any, folder: Path, cpu: bool = True, **options: Any
) -> Any:
    """TRL's trainer of the loss, about to read the rows in their order."""
    make, arguments, extra, features, data = _kind(loss, rows)
    from datasets import Dataset

    args = arguments(
        str(folder),
        **{"use_cpu": cpu, "gradient_checkpointing": False, "report_to": "none", "save_strategy": "no"},
        **{"eval_strategy": "no", "logging_steps": 1, "num_train_epochs": 1, "max_grad_norm": 1.0},
        **{"lr_scheduler_type": "constant", "weight_decay": 0.0, "train_sampling_strategy": "sequential"},
        **{"disable_tqdm": True, **extra, **options},
    )
    made = make(model=model, args=args, train_dataset=Dataset.from_list([data] * 2), processing_class=tokenizer)
    made.train_dataset = Dataset.from_list(features)
    return made


def _kind(loss: str, rows: Sequence[Row]) -> tuple[Any, Any, dict[str, Any], list[dict[str, Any]], dict[str, Any]]:
    import trl

    if loss == "kto":
        data = {"prompt": "w2", "completion": "w3", "label": True}
        return trl.KTOTrainer, trl.KTOConfig, {}, [_labelled(row) for row in rows], data
    if loss in OF_DPO:
        return trl.DPOTrainer, trl.DPOConfig, {"loss_type": [OF_DPO[loss]]}, [_pair(row) for row in rows], PAIR
    from trl.experimental.cpo import CPOConfig, CPOTrainer
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    features = [_masked_pair(row) for row in rows]
    if loss == "orpo":
        return ORPOTrainer, ORPOConfig, {"remove_unused_columns": False}, features, PAIR
    simpo = {"loss_type": "simpo", "cpo_alpha": 0.0, "beta": 2.0, "simpo_gamma": 0.5} if loss == "simpo" else {}
    return CPOTrainer, CPOConfig, {"remove_unused_columns": False, **simpo}, features, PAIR


def _labelled(row: Row) -> dict[str, Any]:
    own, other = map(list, row.branches)
    return {"prompt_ids": list(row.prompt), "completion_ids": own, "KL_completion_ids": other, "label": row.desirable}


def _pair(row: Row) -> dict[str, Any]:
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    return dict(zip(names, map(list, (row.prompt, *row.branches)), strict=True))


def _masked_pair(row: Row) -> dict[str, Any]:
    feature: dict[str, Any] = {}
    for side, branch in zip(("chosen", "rejected"), row.branches, strict=True):
        ids = [*row.prompt, *branch]
        feature[f"{side}_input_ids"], feature[f"{side}_attention_mask"] = ids, [1] * len(ids)
        feature[f"{side}_labels"] = [-100] * len(row.prompt) + list(branch)
    return feature


def train(made: Any) -> tuple[list[float], float]:
    """The losses of all steps, and the seconds from the first step's start to the last one's end."""
    from transformers import TrainerCallback

    losses: list[float] = []
    compute = made.compute_loss

    def recording(*args: Any, **options: Any) -> Any:
        found = compute(*args, **options)
        losses.append(float((found[0] if isinstance(found, tuple) else found).detach()))
        return found

    class Clock(TrainerCallback):
        begin = end = 0.0

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.begin = time.perf_counter()

        def on_train_end(self, *_: Any, **__: Any) -> None:
            self.end = time.perf_counter()

    clock = Clock()
    made.add_callback(clock)
    made.compute_loss = recording
    made.train()
    return losses, clock.end - clock.begin


@contextmanager
def patched(who: str) -> Iterator[None]:
    """Within this context, TRL's trainers are patched for the contestant.

    ``trl_lean`` leaves out entropy, mean logits and accuracy, which TRL computes in every step for its log; the log
    then has other numbers in their place. ``trl_best`` also scores only the tokens of completions, as TRL itself does
    on a GPU but not on a CPU.
    """
    if who == "trl":
        yield
        return
    from trl.trainer import dpo_trainer, kto_trainer, utils

    with ExitStack() as stack:
        for module in (dpo_trainer, kto_trainer):
            stack.enter_context(mock.patch.object(module, "add_fused_lm_head", _log_probs_only))
        if who == "trl_best":
            stack.enter_context(mock.patch.object(utils, "_use_triton", return_value=True))
        yield


def _log_probs_only(model: Any, *_: Any, **__: Any) -> None:
    from trl.trainer.utils import add_fused_lm_head

    add_fused_lm_head(model)
    forward = model.forward

    def filled(*args: Any, **options: Any) -> Any:
        outputs = forward(*args, **options)
        if options.get("fused_lm_head"):  # what TRL logs needs tensors of this shape
            outputs.entropy = outputs.mean_logits = outputs.log_probs.detach()
            outputs.is_top1 = outputs.entropy > 0
        return outputs

    model.forward = filled


def use_our_products(made: Any) -> None:
    """Let the layers of TRL's policy and reference compute as ours do (:func:`use_cpu_kernels`)."""
    for model in (made.model, made.ref_model):
        use_cpu_kernels(model)


def installed() -> str | None:
    """TRL's version, or None."""
    try:
        return version("trl")
    except ModuleNotFoundError:
        return None
