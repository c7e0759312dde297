"""``run_rounds(cfg, train)``: runs that follow each other, each from the last one's policy.

Round 1 learns from the configured data, perhaps after a round 0 of another loss on the same data (``before``). Each
further round samples the last policy on the data's training prompts, has the judge say what it thinks of the samples,
and learns from that; its validation data stay the same. Every round is a whole run in a folder of its own, with its
samples and its feedback beside its model.
"""

from __future__ import annotations

import gc
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from halos import terminal
from halos.commands.label import label
from halos.commands.round_checks import check_rounds
from halos.commands.sample import sample
from halos.config.flat import flatten
from halos.files import write_atomically
from halos.training.run_folder import RunFolder

SETTINGS = "rounds.yaml"
_FREE = (
    "output_dir", "resume", "overwrite", "cache_dir", "rounds.count", "trainer.enable_progress_bar", "claim", "logger",
)  # fmt: skip
"""Keys that may differ when a command goes on with rounds that another one began."""
_OF_FEEDBACK = ("judge", "rounds.")
"""Keys that may differ besides, as long as no round has feedback."""
_DRAWING = ("samples", "max_new_tokens", "temperature", "top_p", "engine")


def run_rounds(cfg: DictConfig, train: Callable[[DictConfig], Any]) -> Path:
    """All rounds as configured, each by ``train``; returns the folder of the last one.

    Raises ``ValueError`` for a bad configuration before the first round, and for a folder that holds other rounds.
    """
    check_rounds(cfg, partial(round_config, cfg))
    root = Path(cfg.output_dir)
    _open(cfg, root)
    first = 0 if cfg.get("before") else 1
    for number in range(first, cfg.rounds.count + 1):
        folder = root / f"round{number}"
        if (folder / "summary.json").is_file():
            terminal.say(f"round {number} is there: {folder}")
            continue
        if number > 1:
            _feedback(cfg, number)
            _free_gpu()
        terminal.say(f"round {number} of {cfg.rounds.count}: {folder}")
        train(round_config(cfg, number))
    return folder


def round_config(cfg: DictConfig, number: int) -> DictConfig:
    """The configuration of one round: that of the rounds, with its own loss, model, data and folder."""
    start = _folder(cfg, number - 1) / "model"
    # First the folder: other keys are made of it.
    made: Any = OmegaConf.merge(cfg, {"output_dir": str(_folder(cfg, number)), "resume": "auto", "overwrite": False})
    made = OmegaConf.to_container(made, resolve=True)
    if number == 0:
        others = {key: value for key, value in made["before"].items() if key != "loss"}
        made = OmegaConf.to_container(OmegaConf.merge(made, others))
        made["loss"] = made["before"].get("loss", made["loss"])
    elif number > 1 or cfg.get("before"):
        made["model"] |= {"path": str(start), "random_weights": False}
    if number > 1:
        file = str(_folder(cfg, number) / "feedback.jsonl")
        world, held = made["data"]["source"], {"val_size": made["data"]["val_size"], "seed": cfg.seed}
        made["data"] |= {"train": file} if "train" in made["data"] else {}
        made["data"]["source"] = {
            "_target_": "halos.data.sources.on_policy.OnPolicySource", "feedback": file, "world": world, **held
        }  # fmt: skip
        made["model"]["reference_path"] = _first_reference(cfg) if cfg.rounds.reference == "first" else None
    made["rounds"] |= {"round": number, "start": cfg.model.path}
    made |= {"claim": made["claim"] if number == cfg.rounds.count else None}
    return OmegaConf.create(made)


def _first_reference(cfg: DictConfig) -> str:
    start = str(_folder(cfg, 0) / "model") if cfg.get("before") else cfg.model.path
    return str(cfg.model.reference_path or start)


def _folder(cfg: DictConfig, number: int) -> Path:
    return Path(cfg.output_dir) / f"round{number}"


def _free_gpu() -> None:
    # What sampled and judged is gone, but PyTorch keeps its memory, which other processes may now train in.
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def _feedback(cfg: DictConfig, number: int) -> None:
    """Samples of the last round's policy, and what the judge says of them; what is there is not made again."""
    rounds, folder = cfg.rounds, _folder(cfg, number)
    common = {"device": "auto", "precision": "32-true", "progress": cfg.trainer.enable_progress_bar}
    common |= {"seed": cfg.seed, "overwrite": False, "data": OmegaConf.to_container(cfg.data, resolve=True)}
    samples, feedback = folder / "samples.jsonl", folder / "feedback.jsonl"
    if feedback.is_file():
        return
    drawing = {name: rounds[name] for name in _DRAWING}
    where = {"policy": str(_folder(cfg, number - 1)), "split": "train", "output": str(samples)}
    sample(OmegaConf.create({**common, **drawing, **where, "size": rounds.prompts, "batch_size": rounds.batch_size}))
    asking = {"samples": str(samples), "judge": cfg.judge, "feedback": rounds.feedback, "output": str(feedback)}
    label(OmegaConf.create({**common, **asking}))


def _open(cfg: DictConfig, root: Path) -> None:
    """Make the folder of the rounds, or make sure that it holds these."""
    settings, new = root / SETTINGS, _settings(cfg)
    if cfg.resume not in (None, "auto"):
        raise ValueError(f"resume: expected auto with rounds, found {cfg.resume}")
    there = sorted(path for path in root.glob("round*") if path.is_dir() and path.name[5:].isdecimal())
    if there and not settings.is_file():  # a run of another command may have any name; overwrite would remove it
        raise ValueError(
            f"output_dir: expected {SETTINGS} beside the rounds in {root}, found {there[0].name} without it, which "
            "other commands have left; choose another folder"
        )
    if cfg.overwrite:
        for folder in there:
            shutil.rmtree(folder)
    elif settings.is_file() and cfg.resume is None:
        raise ValueError(
            f"output_dir: {root} holds other rounds; choose another folder, or set resume=auto to go on with them, or "
            "overwrite=true to replace them"
        )
    elif settings.is_file():
        _go_on(root, flatten(OmegaConf.to_container(OmegaConf.load(settings))), new)
    else:
        RunFolder(root).check(resume=None, overwrite=False)  # no run lies here
    root.mkdir(parents=True, exist_ok=True)
    write_atomically(settings, OmegaConf.to_yaml(OmegaConf.create(new)))


def _go_on(root: Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    differ = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    judged = any(root.glob("round*/feedback.jsonl"))
    for key in differ:
        if judged or not key.startswith(_OF_FEEDBACK):
            was = f"{key} was {old.get(key)}, found {new.get(key)}"
            raise ValueError(f"resume: expected the settings of the rounds in {root}: {was}")
    if any(key.removeprefix("rounds.") in (*_DRAWING, "prompts", "batch_size") for key in differ):
        for samples in root.glob("round*/samples.jsonl"):
            terminal.say(f"samples are drawn again, as {', '.join(differ)} differs: {samples}")
            samples.unlink()


def _settings(cfg: DictConfig) -> dict[str, Any]:
    """What has to stay the same from one command to the next, by flat keys."""
    flat = flatten(OmegaConf.to_container(cfg, resolve=True))
    return {key: value for key, value in flat.items() if not key.startswith(_FREE)}
