"""``run_rounds(cfg, train)``: several runs in a row, each starting from the policy of the last one.

Round 1 learns from the configured data, optionally after a round 0 with another loss on the same data (``before``).
Each further round samples the last policy on the training prompts, has the judge label the samples, and learns from
these labels; the validation data stay the same. Every round is a complete run in a folder of its own, which also holds
its samples and its feedback.
"""

import gc
import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf

from halos import terminal
from halos.commands.label import label
from halos.commands.round_checks import check_rounds
from halos.commands.sample import sample
from halos.config.nodes import Node, flatten, plain
from halos.config.saved import read_saved
from halos.files import write_atomically
from halos.reporting import run_report
from halos.training.run_folder import RunFolder, held

SETTINGS = "rounds.yaml"
"""The file that holds the settings of all rounds, next to their folders."""
_FREE_KEYS = (
    "output_dir", "resume", "overwrite", "cache_", "rounds.count", "trainer.enable_progress_bar", "claim", "logger",
    "hub.",
)  # fmt: skip
"""Beginnings of keys that may change when a command continues the rounds of an earlier one."""
_FEEDBACK_KEYS = ("judge", "rounds.")
"""Beginnings of keys that may also change as long as no round has feedback."""
_DECODING_KEYS = ("samples", "max_new_tokens", "temperature", "top_p", "engine")
"""Keys of ``rounds`` that :func:`sample` takes under the same names."""
_SAMPLE_KEYS = (*(f"rounds.{name}" for name in _DECODING_KEYS), "rounds.prompts", "rounds.batch_size")
"""Keys that decide which samples are drawn."""


def run_rounds(cfg: DictConfig, train: Callable[[DictConfig], object]) -> Path:
    """Run all rounds, and skip those that are complete.

    Args:
        cfg: the configuration of a run, with the number of rounds in ``rounds.count``.
        train: trains one round from its configuration.

    Returns:
        The folder of the last round.

    Raises:
        ValueError: the configuration is bad, found before the first round; or the folder holds other rounds.
    """
    check_rounds(cfg, partial(round_config, cfg))
    with held(cfg.output_dir):
        return _run_rounds(cfg, train)


def _run_rounds(cfg: DictConfig, train: Callable[[DictConfig], object]) -> Path:
    _open(cfg, Path(cfg.output_dir))
    first = 0 if cfg.get("before") else 1
    # Each round is complete before the next one is configured, as its model and samples are files of the last one.
    for number in range(first, cfg.rounds.count + 1):
        folder = _folder(cfg, number)
        if (folder / "summary.json").is_file():  # written last, so the round is complete
            terminal.say(f"round {number} is there: {folder}")
            continue
        if number > 1:
            _write_feedback(cfg, number)
            _free_gpu()
        terminal.say(f"round {number} of {cfg.rounds.count}: {folder}")
        train(round_config(cfg, number))
    run_report.show_rounds({number: _summary(cfg, number) for number in range(first, cfg.rounds.count + 1)})
    return folder


def _summary(cfg: DictConfig, number: int) -> Node:
    file = _folder(cfg, number) / "summary.json"
    return dict(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else {}


def round_config(cfg: DictConfig, number: int) -> DictConfig:
    """The configuration of round ``number``: the command's, with the round's own loss, model, data and folder."""
    # The folder comes first, as other keys are interpolated from it.
    round_settings = {"output_dir": str(_folder(cfg, number)), "resume": "auto", "overwrite": False}
    node = plain(OmegaConf.merge(cfg, round_settings))
    if number == 0:
        before = node["before"]
        others = {key: value for key, value in before.items() if key != "loss"}
        node = plain(OmegaConf.merge(node, others))
        # Not merged: the other loss's parameters would be left over.
        node["loss"] = before.get("loss", node["loss"])
    elif number > 1 or cfg.get("before"):
        node["model"] |= {"path": str(_folder(cfg, number - 1) / "model"), "random_weights": False}
    if number > 1:
        node["data"] = _data_of_round(node["data"], _folder(cfg, number) / "feedback.jsonl", cfg.seed)
        start = str(_folder(cfg, 0) / "model") if cfg.get("before") else cfg.model.path
        first = cfg.model.reference_path or start
        node["model"]["reference_path"] = str(first) if cfg.rounds.reference == "first" else None
    node["rounds"] |= {"round": number, "start": cfg.model.path}
    if number != cfg.rounds.count:
        node["claim"] = None  # an experiment's claim is about the last round
        node["hub"]["push"] = None
    return OmegaConf.create(node)


def _data_of_round(data: Node, feedback: Path, seed: int) -> Node:
    """The data of a later round: training feedback from a file, held-out data from the source of the first round."""
    held_out = {"world": data["source"], "val_size": data["val_size"], "seed": seed}
    source = {"_target_": "halos.data.sources.on_policy.OnPolicySource", "feedback": str(feedback), **held_out}
    train = {"train": str(feedback)} if "train" in data else {}
    return {**data, **train, "source": source}


def _folder(cfg: DictConfig, number: int) -> Path:
    return Path(cfg.output_dir) / f"round{number}"


def _free_gpu() -> None:
    # The models that sampled and judged have been freed by now, but PyTorch's allocator keeps their memory, which other
    # processes could not use. The next round may train in such processes. Without a GPU this does nothing.
    gc.collect()
    torch.cuda.empty_cache()


def _write_feedback(cfg: DictConfig, number: int) -> None:
    """Sample the last round's policy and label the samples; files that an earlier command has written are kept."""
    rounds, folder = cfg.rounds, _folder(cfg, number)
    # sample() continues a file that a killed command has left; label() writes its file in one go.
    samples, feedback = folder / "samples.jsonl", folder / "feedback.jsonl"
    if feedback.is_file():
        return
    common = {"device": "auto", "precision": "32-true", "seed": cfg.seed, "overwrite": False, "data": plain(cfg.data)}
    common["progress"] = cfg.trainer.enable_progress_bar
    sampling = {name: rounds[name] for name in (*_DECODING_KEYS, "batch_size")}
    policy = {"policy": str(_folder(cfg, number - 1)), "split": "train", "size": rounds.prompts}
    # The user's own command allows it, for the model and for what its rounds export.
    policy["trust_remote_code"] = [policy["policy"], cfg.model.path] if cfg.model.trust_remote_code else []
    sample(OmegaConf.create({**common, **sampling, **policy, "output": str(samples)}))
    labelling = {"samples": str(samples), "judge": cfg.judge, "feedback": rounds.feedback, "output": str(feedback)}
    label(OmegaConf.create({**common, **labelling}))


def _open(cfg: DictConfig, root: Path) -> None:
    """Create the folder of the rounds, or check that it holds these rounds."""
    file = root / SETTINGS
    settings = {key: value for key, value in flatten(plain(cfg)).items() if not key.startswith(_FREE_KEYS)}
    if cfg.resume not in (None, "auto"):
        raise ValueError(f"resume: expected auto with rounds, found {cfg.resume}")
    folders = sorted(path for path in root.glob("round*") if path.is_dir() and path.name[5:].isdecimal())
    # A folder of this name may be a run of another command. Without this check, overwrite would remove it.
    if folders and not file.is_file():
        found = f"{folders[0].name} without it, which other commands have left; choose another folder"
        raise ValueError(f"output_dir: expected {SETTINGS} next to the rounds in {root}, found {found}")
    if cfg.overwrite:
        # The folders of the rounds only, not the whole root: it may hold files of the user's.
        for folder in folders:
            shutil.rmtree(folder)
    elif not file.is_file():
        RunFolder(root).check(resume=None, overwrite=False)  # raises if the folder holds a run
    elif cfg.resume is None:
        hint = "choose another folder, or set resume=auto to go on with them, or overwrite=true to replace them"
        raise ValueError(f"output_dir: {root} holds other rounds; {hint}")
    else:
        _check_settings(root, read_saved(file), settings)
    write_atomically(file, OmegaConf.to_yaml(OmegaConf.create(settings)))


def _check_settings(root: Path, old: Node, new: Node) -> None:
    """Check that rounds can continue with changed settings, and remove samples that were drawn with other ones."""
    changed = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    has_feedback = any(root.glob("round*/feedback.jsonl"))
    for key in changed:
        if has_feedback or not key.startswith(_FEEDBACK_KEYS):
            values = f"{key} was {old.get(key)}, found {new.get(key)}"
            raise ValueError(f"resume: expected the settings of the rounds in {root}: {values}")
    if any(key in _SAMPLE_KEYS for key in changed):
        for samples in root.glob("round*/samples.jsonl"):
            terminal.say(f"samples are drawn again, as {', '.join(changed)} differs: {samples}")
            samples.unlink()
