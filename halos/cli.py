"""The command line: ``halos train …`` and ``python scripts/train.py …``; a failed command ends with one clear line.

Neither torch nor Lightning is imported here, so that a misspelt key is reported within a second.
"""

import os
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import cast

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from halos.config.combinations import check_combinations, values_of
from halos.config.errors import check_complete, no_such_option
from halos.config.folder import config_folder
from halos.config.help_text import command_help, commands_help
from halos.config.one_line import end_with_one_line, fail, line_of, message_of
from halos.config.open_keys import opened
from halos.config.shorthand import implied_groups, own_source
from halos.config.signatures import did_you_mean
from halos.config.sweep_words import check_pushed, check_pushed_alone, named_by_what_is_swept
from halos.config.words import check_words, without_flags
from halos.processes import sweeps
from halos.processes.launch import die_with_parent, on_devices
from halos.processes.provenance import called_by
from halos.training.result import trial_value


@dataclass(frozen=True, slots=True)
class Command:
    """A command of the command line.

    Attributes:
        function: the name of a module in :mod:`halos.commands` and of its function that takes the configuration.
        config: the name of the command's YAML in ``conf/``.
        meaning: what the command does, in a line.
        has_run_folder: whether the command has an output folder and may use several devices.
    """

    function: str
    config: str
    meaning: str
    has_run_folder: bool = False


COMMANDS = {
    "train": Command("train", "train", "align a model with human feedback", has_run_folder=True),
    "data": Command("inspect_data", "inspect", "show what is in feedback and what is wrong with it"),
    "advise": Command("advise", "advise", "count feedback and list the losses that fit it"),
    "estimate": Command("estimate", "train", "estimate the memory and time that a run needs on given GPUs"),
    "cache-reference": Command(
        "cache_reference", "train", "compute the reference's log-probs of a run beforehand", has_run_folder=True
    ),
    "sample": Command("sample", "sample", "sample replies of a policy to prompts"),
    "label": Command("label", "label", "have a judge turn replies into feedback"),
    "evaluate": Command("evaluate", "evaluate", "measure a policy on held-out feedback and by its replies"),
    "compare": Command("compare", "compare", "put runs next to each other, with intervals and figures"),
    "reference-points": Command(
        "reference_points", "reference_points", "measure KTO's reference points next to a policy's KL"
    ),
    "fit-value": Command("fit_value", "fit_value", "fit people's value function to their feedback, for loss=halo"),
    "export": Command("export", "export", "make a model folder of a checkpoint"),
    "check-gpu": Command("check_gpu", "check_gpu", "check this machine's GPUs: exactness, waits, speed"),
}
COMMAND = "HALOS_COMMAND"
"""Environment variable: the command's name, for the other processes of the same run."""


def plain_name(text: str) -> str:
    """A name for a folder that needs no quotes in a shell or in a Hydra override: letters, digits, ``_ . + -``."""
    return re.sub(r"[^A-Za-z0-9.+-]+", "_", text).strip("_")


# conf/train.yaml names the folders of a sweep with this resolver. It is registered on import, because processes that a
# launcher starts import this module before they resolve the configuration.
OmegaConf.register_new_resolver("plain_name", plain_name, replace=True)


def main() -> None:
    """Run ``halos COMMAND [overrides]``."""
    command = sys.argv[1] if len(sys.argv) > 1 else ""
    if command == "rank" and len(sys.argv) == 3:  # started by halos.processes.launch
        end_with_one_line(lambda: _rank_job(Path(sys.argv[2])))
        return
    # Lightning's DDP starts the other ranks with this process's sys.argv, from which the command's name was removed.
    launched = os.environ.get(COMMAND, "") if "LOCAL_RANK" in os.environ else ""
    completing = "-sc" in sys.argv or "--shell-completion" in sys.argv
    if command in COMMANDS:
        del sys.argv[1]
        os.environ[COMMAND] = command
    elif launched:
        command = launched
    elif command in ("", "-h", "--help"):
        print(commands_help({name: one.meaning for name, one in COMMANDS.items()}))
        return
    elif not completing:
        close = did_you_mean(command, list(COMMANDS))
        fail(f"halos {command}: no such command{close}; expected one of {', '.join(COMMANDS)}")
    if completing:
        # Hydra completes overrides, which follow the program's name directly.
        line = os.environ.get("COMP_LINE", "")
        os.environ["COMP_LINE"] = re.sub(f"^halos ({'|'.join(COMMANDS)})", "halos", line)
    main_command(command or "train")


def main_command(name: str) -> None:
    """Compose the command's configuration from the words of the command line, and run the command."""
    os.environ[COMMAND] = name
    chosen, words = COMMANDS[name], opened(sys.argv[1:])
    if {"-h", "--help"} & set(words):
        print(command_help(name, chosen.meaning, chosen.config, words))
        return
    implied = implied_groups(words) if chosen.config == "train" else []
    settings, flags = without_flags([*own_source(words), *implied, *words])
    swept = chosen.has_run_folder and bool({"-m", "--multirun"} & set(flags))
    job = _hydra_job if chosen.has_run_folder else _call_command
    command = hydra.main(version_base="1.3", config_path=config_folder(), config_name=chosen.config)(job)

    def sweep() -> None:
        with sweeps.passed_on_to_jobs(), sweeps.failures_counted(message_of):
            command()

    def checked() -> None:
        check_words(words)
        if swept:
            check_pushed(settings)
            settings.append(named_by_what_is_swept(settings))
        elif not chosen.has_run_folder and chosen.config == "train":
            settings.insert(0, "hydra.run.dir=.")  # no output folder is made
        sys.argv[1:] = [*settings, *flags]
        (sweep if swept else command)()

    end_with_one_line(checked)


def _hydra_job(cfg: DictConfig) -> float | None:
    name = Path(HydraConfig.get().runtime.output_dir).name
    words = ["halos", os.environ.get(COMMAND) or "train", *HydraConfig.get().overrides.task]
    with sweeps.failure_printed(name, line_of), sweeps.job(), called_by(shlex.join(words)):
        _place(cfg)
        check_pushed_alone(cfg)
        check_combinations(values_of(cfg))
        if cfg.sweep_metric is None or os.environ.get(COMMAND, "train") != "train":
            _run_or_rounds(cfg)
            return None
        # The returned value is for sweepers that search for the best settings; Hydra's default sweeper ignores it.
        folders = [_run_or_rounds(seed_cfg) for seed_cfg in _of_seeds(cfg, cfg.sweep_seeds)]
        return trial_value(folders, cfg.sweep_metric, max_kl=cfg.sweep_max_kl)


def _of_seeds(cfg: DictConfig, seeds: Sequence[int] | None) -> list[DictConfig]:
    if seeds is None:
        return [cfg]
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"sweep_seeds: expected different seeds, found {seeds}")
    changes = [{"seed": seed, "output_dir": f"{cfg.output_dir}/seed_{seed}"} for seed in seeds]
    return [cast("DictConfig", OmegaConf.merge(cfg, keys)) for keys in changes]


def _run_or_rounds(cfg: DictConfig) -> Path:
    # Ranks are processes of their own, also for one job of a sweep: this process goes on to the next job, and it could
    # not leave a process group and join another one.
    run = partial(on_devices, job=_call_command)
    if cfg.rounds.count != 1 or cfg.get("before"):
        _get_ready(cfg)
        from halos.commands.rounds import run_rounds

        return run_rounds(cfg, run)
    run(cfg)
    return Path(cfg.output_dir)


def _place(cfg: DictConfig) -> None:
    context = HydraConfig.get()
    cfg.output_dir = context.runtime.output_dir  # absolute; in a sweep the job's own folder
    words = context.overrides.task
    # The default folder is named after the time, so each process that torchrun or srun starts would choose another one.
    apart = "TORCHELASTIC_RUN_ID" in os.environ or int(os.environ.get("SLURM_NTASKS", "1")) > 1
    if (apart or cfg.trainer.num_nodes > 1) and not any(word.startswith("output_dir=") for word in words):
        raise ValueError("output_dir: expected one for all processes, as they are started apart; set output_dir=…")
    # For an optional group, Hydra silently ignores an option that does not exist, even a misspelt one.
    for group, _, name in (word.partition("=") for word in words):
        if group in ("tuned", "feedback", "world"):
            options = GlobalHydra.instance().config_loader().get_group_options(group)
            if name not in options:
                raise ValueError(no_such_option(group, name, options))


def _rank_job(config: Path) -> None:
    die_with_parent()
    _call_command(cast("DictConfig", OmegaConf.load(config)))


def _call_command(cfg: DictConfig) -> None:
    _get_ready(cfg)
    command = COMMANDS[os.environ.get(COMMAND) or "train"]
    if command.has_run_folder:
        from halos.commands.first_rows import check_first_rows

        check_first_rows(cfg)
    # Imports torch and the rest, which takes seconds.
    getattr(import_module(f"halos.commands.{command.function}"), command.function)(cfg)


def _get_ready(cfg: DictConfig) -> None:
    check_complete(cfg)
    # Modules of the user (loss._target_=mylab.losses.MyLoss) are found in the folder in which the command is run.
    sys.path.insert(0, str(Path.cwd()))


if __name__ == "__main__":
    main()
