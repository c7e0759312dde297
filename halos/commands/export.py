"""``export(cfg)``: makes a Hugging Face model folder of a checkpoint, as a run does at its end."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import lightning.pytorch as pl
import torch
from omegaconf import DictConfig
from torch import Tensor

from halos import terminal
from halos.commands.builders import build_objective
from halos.config.nodes import build, flatten, plain
from halos.config.roles import check_trusted_models
from halos.config.runs import run_config
from halos.data.rows.chat_tokens import ChatTokens, Limits
from halos.files import in_home
from halos.objectives.base import Objective
from halos.policy.adapters import merge_adapter
from halos.policy.export.card import ModelCard
from halos.policy.export.language_model import export_policy
from halos.policy.export.reward_model import export_reward_model
from halos.policy.loading import ModelSpec
from halos.sharding.consolidate import sharded_weights
from halos.sharding.factory import BackboneFactory
from halos.training import checkpoint_files

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FIRST_KEYS = ("loss.name", "optim.lr", "loss.beta")
"""Hyperparameters by which runs are compared first."""
LISTED_GROUPS = {
    "loss": None,
    "optim": None,
    "model.lora": "enabled",
    "humanline": "enabled",
    "reference_sync": "every",
}
"""Groups whose settings are hyperparameters, and the key that switches a group on, if it has one."""
LISTED_KEYS = (
    "model.path", "model.reference", "model.reference_path", "model.dropout",
    "data.batch_size", "data.max_length", "data.max_prompt_length", "data.max_examples", "data.train_on",
    "trainer.accumulate_grad_batches", "trainer.gradient_clip_val", "precision", "seed",
)  # fmt: skip
"""The other settings that are hyperparameters.

Settings that change the trained weights of most runs are hyperparameters. Those for speed, memory or the reading of
data are only in the run's config.yaml.
"""


def export(cfg: DictConfig) -> Path:
    """Load a checkpoint of a run, on the CPU, and write its model into a folder.

    Returns:
        The folder.

    Raises:
        ValueError: the run or the checkpoint does not exist, the folder exists, or the model cannot be exported.
    """
    terminal.set_up_logging()
    run = in_home(cfg.run)
    run_cfg = _as_exported(run_config(run, cfg.get("trust"), check_trusted_models(cfg.trust_remote_code)), cfg)
    checkpoint = _find_checkpoint(run, cfg.checkpoint)
    with _checkpoint_named():
        contents = checkpoint_files.read(checkpoint)
    step = int(contents["global_step"])
    output = run / f"model_step_{step}" if cfg.output is None else in_home(cfg.output)
    if output.exists() and not cfg.overwrite:
        raise ValueError(f"output: {output} exists; choose another folder, or set overwrite=true to replace it")
    objective, model = _untrained(run_cfg)
    control, end = objective.control(True), _end_of_turn(model)
    model.spec.try_export(model.tokenizer, model.base, end_of_turn=end, control=control)
    objective.configure_model()
    _load(objective, sharded_weights(checkpoint) if checkpoint.is_dir() else contents["state_dict"], checkpoint)
    score = None if objective.generates else objective.reward_head.linear.weight.detach()
    card = card_of(run_cfg, objective, hyperparameters(flatten(plain(run_cfg))), {}, step)
    write_model(objective, model, objective.trained.policy, score, output, card)
    terminal.say(f"model: {output} (step {step})")
    return output


def write_model(
    objective: Objective,
    model: BackboneFactory,
    policy: PreTrainedModel,
    score: Tensor | None,
    folder: Path,
    card: ModelCard,
) -> None:
    """Write the trained policy, or the reward model with its ``score`` weights, into the folder.

    The policy is changed: its adapter is merged, if it is to be, and its weights are rounded to the exported precision.
    """
    lora, tokenizer, end = model.spec.lora, model.tokenizer, _end_of_turn(model)
    if lora.enabled and lora.export == "merged":
        merge_adapter(policy)
    if score is None:
        control = objective.control(True)
        export_policy(policy, tokenizer, folder, end_of_turn=end, control=control, card=card, base=model.base)
    else:
        export_reward_model(policy, score, tokenizer, folder, end_of_turn=end, card=card, base=model.base)


def hyperparameters(settings: Mapping[str, object]) -> dict[str, object]:
    """The settings of a run that boards and model cards list, most important first. Null settings are left out.

    Args:
        settings: the resolved configuration by flat keys.
    """
    on = tuple(f"{group}." for group, key in LISTED_GROUPS.items() if key is None or settings[f"{group}.{key}"])
    # Keys that start with _ are Hydra's.
    group_keys = [key for key in settings if key.startswith(on) and "._" not in key]
    names = dict.fromkeys([*(key for key in FIRST_KEYS if key in settings), *group_keys, *LISTED_KEYS])
    values = {key: settings[key] for key in names if settings.get(key) is not None}
    return values | {"strategy": settings["strategy.name"]}


def card_of(
    cfg: DictConfig, objective: Objective, settings: Mapping[str, object], metrics: Mapping[str, float], steps: int
) -> ModelCard:
    """Return the card of the model that a run has after this number of steps."""
    train = cfg.data.get("train")
    return ModelCard(
        loss=cfg.loss.name,
        base=cfg.model.path,
        paper=objective.paper,
        remote_code=cfg.model.trust_remote_code,
        data=[train] if isinstance(train, str) else list(train or ()),
        hyperparameters={**settings, "steps": steps},
        metrics=metrics,
    )


def _end_of_turn(model: BackboneFactory) -> int:
    return ChatTokens(model.tokenizer, Limits(2)).end_of_turn


def _as_exported(run: DictConfig, cfg: DictConfig) -> DictConfig:
    if cfg.dtype is not None:
        run.model.export_dtype = cfg.dtype
    if cfg.lora is not None:
        if not run.model.lora.enabled:
            raise ValueError(f"lora: expected null for a run without model.lora.enabled, found {cfg.lora}")
        run.model.lora.export = cfg.lora
    return run


def _find_checkpoint(run: Path, name: str | None) -> Path:
    if name is None:
        with _checkpoint_named():
            checkpoint = checkpoint_files.newest(run / "checkpoints")
        if checkpoint is None:
            raise ValueError(f"run: expected checkpoints in {run / 'checkpoints'}, found none")
        return checkpoint
    paths = (run / "checkpoints" / name, in_home(name))
    existing = [path for path in paths if path.exists()]
    if not existing:
        raise ValueError(
            f"checkpoint: expected a name in {paths[0].parent} or a path, found {name}, which does not exist"
        )
    with _checkpoint_named():
        checkpoint_files.check_intact(existing[0])
    return existing[0]


@contextmanager
def _checkpoint_named() -> Iterator[None]:
    # Errors about checkpoints name the key of a training run.
    try:
        yield
    except ValueError as error:
        raise ValueError(str(error).replace("resume: ", "checkpoint: ")) from error


def _untrained(cfg: DictConfig) -> tuple[Objective, BackboneFactory]:
    """Build the objective and the factory of its backbone as the run did, without parts that only training needs."""
    pl.seed_everything(cfg.seed, verbose=False)  # random weights under LoRA are those of the run
    objective = build_objective(cfg, build(cfg.optim))
    spec: ModelSpec = build(cfg.model)
    spec = replace(spec.resolved(streaming=False), compile=False, liger=False, packed_attention="pieces")
    if spec.reference == "live":
        spec = replace(spec, reference="cached")  # no copy of the policy
    model = BackboneFactory(spec, dtype=torch.bfloat16 if cfg.precision == "bf16-true" else torch.float32)
    objective.source = model
    objective.ready_tokenizer()
    return objective, model


def _load(objective: Objective, state: Mapping[str, Tensor], checkpoint: Path) -> None:
    try:
        with _checkpoint_named():
            objective.load_state_dict(state)
    except RuntimeError as error:  # names or shapes of another model
        raise ValueError(f"checkpoint: {checkpoint} is not of this run's model: {error}") from error
