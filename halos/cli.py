"""The command line: ``python scripts/train.py …`` and ``halos train …``; a failed command ends with one clear line."""

from __future__ import annotations

import errno
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, cast

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from halos.config.errors import explain, require_plain_booleans
from halos.config.signatures import did_you_mean
from halos.processes import sweeps
from halos.processes.errors import RunFailed
from halos.processes.launch import ERRORS, die_with_parent, ranks_to_start, run_ranks
from halos.processes.signals import caught
from halos.training.result import trial_value


@dataclass(frozen=True, slots=True)
class Command:
    """``function`` takes the configuration ``conf/CONFIG.yaml``; a ``run`` has a folder and may use many devices."""

    function: str
    config: str
    run: bool = False


COMMANDS = {
    "train": Command("halos.commands.train:train", "train", run=True),
    "cache-reference": Command("halos.commands.cache_reference:cache_reference", "train", run=True),
    "estimate": Command("halos.commands.estimate:estimate", "train"),
    "data": Command("halos.commands.inspect_data:inspect_data", "inspect"),
    "sample": Command("halos.commands.sample:sample", "sample"),
    "evaluate": Command("halos.commands.evaluate:evaluate", "evaluate"),
    "label": Command("halos.commands.label:label", "label"),
    "compare": Command("halos.commands.compare:compare", "compare"),
}
COMMAND = "HALOS_COMMAND"
"""The variable in which other processes of a run find the command."""
_EXPECTED = (HydraException, OmegaConfBaseException, ValueError, RunFailed)


def config_folder() -> str:
    """The ``conf`` tree: inside an installed package, beside it in a checkout."""
    package = Path(__file__).parent
    inside = package / "conf"
    return str(inside if inside.is_dir() else package.parent / "conf")


def plain_name(text: str) -> str:
    """A name for a folder that needs no quotes in a shell or in a Hydra override: letters, digits, ``_ . + -``."""
    return re.sub(r"[^A-Za-z0-9.+-]+", "_", text).strip("_")


# conf/train.yaml names the folders of a sweep with it. Registered on import, as processes that a launcher starts
# resolve the configuration after they have imported this module.
OmegaConf.register_new_resolver("plain_name", plain_name, replace=True)


def main() -> None:
    """``halos COMMAND [overrides]``."""
    command = sys.argv[1] if len(sys.argv) > 1 else ""
    if command == "rank" and len(sys.argv) == 3:  # one of several that halos.processes.launch has started
        end_with_one_line(lambda: _rank_job(Path(sys.argv[2])))
        return
    launched = os.environ.get(COMMAND, "") if "LOCAL_RANK" in os.environ else ""  # by DDP, without the command
    completing = "-sc" in sys.argv or "--shell-completion" in sys.argv
    if command in COMMANDS:
        del sys.argv[1]
        os.environ[COMMAND] = command
    elif launched:
        command = launched
    elif not completing:
        _fail(f"usage: halos {{{','.join(COMMANDS)}}} [group=option …] [key=value …]; found {command!r}")
    if completing:
        # Hydra completes the words behind the program's name; the command's name is not one of its overrides.
        line = os.environ.get("COMP_LINE", "")
        os.environ["COMP_LINE"] = re.sub(f"^halos ({'|'.join(COMMANDS)})", "halos", line)
    main_command(command or "train")


def main_command(name: str) -> None:
    """Compose the command's configuration from the command line and do what it says."""
    os.environ[COMMAND] = name
    if COMMANDS[name].run:
        name_jobs_by_what_is_swept(sys.argv)
    elif COMMANDS[name].config == "train":
        sys.argv.insert(1, "hydra.run.dir=.")  # it leaves nothing behind
    job = _run_job if COMMANDS[name].run else _run
    command = hydra.main(version_base="1.3", config_path=config_folder(), config_name=COMMANDS[name].config)(job)

    def sweep() -> None:
        with sweeps.passed_on_to_jobs(), sweeps.failures_counted(_message):
            command()

    end_with_one_line(sweep if COMMANDS[name].run and {"-m", "--multirun"} & set(sys.argv) else command)


def _run_job(cfg: DictConfig) -> float | None:
    name = Path(HydraConfig.get().runtime.output_dir).name
    with sweeps.failure_told(name, _line), sweeps.job():
        return _run_placed(cfg)


def _run_placed(cfg: DictConfig) -> float | None:
    _place(cfg)
    if cfg.sweep_metric is None and (cfg.sweep_seeds is not None or cfg.sweep_max_kl is not None):
        raise ValueError("sweep_metric: expected one with sweep_seeds and sweep_max_kl, found none")
    if cfg.sweep_metric is None or os.environ.get(COMMAND, "train") != "train":
        _run_or_rounds(cfg)
        return None
    # A sweeper that looks for the best settings is told how they did; Hydra's own takes no notice.
    folders = [_run_or_rounds(of_seed) for of_seed in _of_seeds(cfg)]
    return trial_value(folders, cfg.sweep_metric, max_kl=cfg.sweep_max_kl)


def _of_seeds(cfg: DictConfig) -> list[DictConfig]:
    if cfg.sweep_seeds is None:
        return [cfg]
    if not cfg.sweep_seeds or len(set(cfg.sweep_seeds)) < len(cfg.sweep_seeds):
        raise ValueError(f"sweep_seeds: expected different seeds, found {cfg.sweep_seeds}")
    own: Any = [{"seed": seed, "output_dir": f"{cfg.output_dir}/seed_{seed}"} for seed in cfg.sweep_seeds]
    return [cast("DictConfig", OmegaConf.merge(cfg, keys)) for keys in own]


def _run_or_rounds(cfg: DictConfig) -> Path:
    if cfg.rounds.count != 1 or cfg.get("before"):
        _get_ready(cfg)
        from halos.commands.rounds import run_rounds

        return run_rounds(cfg, _run_on_devices)
    _run_on_devices(cfg)
    return Path(cfg.output_dir)


def _run_on_devices(cfg: DictConfig) -> None:
    # In a sweep too, where this process goes on to the next job, several devices have their own processes.
    if (count := ranks_to_start(cfg)) > 1:
        run_ranks(cfg, count)
    else:
        _run(cfg)


def _place(cfg: DictConfig) -> None:
    context = HydraConfig.get()
    cfg.output_dir = context.runtime.output_dir  # in a sweep the job's own folder
    _require_output_dir(cfg, context.overrides.task)
    _require_options(context.overrides.task)


def _rank_job(config: Path) -> None:
    die_with_parent()
    _run(cast("DictConfig", OmegaConf.load(config)))


def _run(cfg: DictConfig) -> None:
    _get_ready(cfg)
    module, _, function = COMMANDS[os.environ.get(COMMAND) or "train"].function.partition(":")
    # Heavy imports: a misspelt key should not wait for them.
    getattr(import_module(module), function)(cfg)


def _get_ready(cfg: DictConfig) -> None:
    missing = sorted(str(key) for key in OmegaConf.missing_keys(cfg))
    if missing:
        raise ValueError(f"{missing[0]}: expected a value, found none; set {missing[0]}=…")
    require_plain_booleans(OmegaConf.to_container(cfg))
    # The user's own modules (loss._target_=mylab.losses.MyLoss) lie where the command is run.
    sys.path.insert(0, str(Path.cwd()))


def name_jobs_by_what_is_swept(words: list[str]) -> None:
    """Keep what is the same for all jobs of a sweep out of the names of their folders."""
    if not {"-m", "--multirun"} & set(words):
        return
    parser = OverridesParser.create()
    given = [parser.parse_override(word) for word in words[1:] if "=" in word and not word.startswith("-")]
    swept = {o.key_or_group for o in given if o.is_sweep_override()}
    same = [o.key_or_group for o in given if o.key_or_group not in swept and not o.key_or_group.startswith("hydra.")]
    kept = ["output_dir", "overwrite", *same]
    # Among the other overrides: Hydra's parser takes them in one stretch only.
    place = max(n for n, word in enumerate(words) if n == 0 or ("=" in word and not word.startswith("-")))
    words.insert(place + 1, f"hydra.job.config.override_dirname.exclude_keys=[{','.join(dict.fromkeys(kept))}]")


def _require_output_dir(cfg: DictConfig, words: Sequence[str]) -> None:
    # Processes that something else starts (torchrun, srun) would each name a folder after their own clock.
    apart = "TORCHELASTIC_RUN_ID" in os.environ or int(os.environ.get("SLURM_NTASKS", "1")) > 1
    if (apart or cfg.trainer.num_nodes > 1) and not any(word.startswith("output_dir=") for word in words):
        raise ValueError("output_dir: expected one for all processes, as they are started apart; set output_dir=…")


def _require_options(words: Sequence[str]) -> None:
    # Hydra passes over an optional group that has no such option, a misspelt one too.
    for group, _, name in (word.partition("=") for word in words):
        if group in ("tuned", "feedback"):
            options = GlobalHydra.instance().config_loader().get_group_options(group)
            if name not in options:
                told = ", ".join(options)
                raise ValueError(f"{group}={name}: no such option{did_you_mean(name, options)}; expected one of {told}")


def end_with_one_line(job: Callable[[], Any]) -> None:
    """Do the job; if it fails, the process ends with status 1 and one clear line last."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then lets errors through instead of printing them its own way
    try:
        with caught():
            job()
    except Exception as error:
        _fail(_line(error))


def _line(error: BaseException) -> str:
    """What is said of an error; of one that nobody expected, its traceback is printed first."""
    full_disk = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    if not full_disk and not isinstance(error, _EXPECTED):
        traceback.print_exception(error)
    return _message(error)


def _message(error: BaseException) -> str:
    if isinstance(error, HydraException | OmegaConfBaseException):
        return explain(error)
    if isinstance(error, _EXPECTED):
        return " ".join(str(error).split())  # those of other packages may have several
    return f"{type(error).__name__}: {error}"


def _fail(message: str) -> None:
    if folder := os.environ.get(ERRORS):  # of a rank: the process that watches it says it, once
        Path(folder, f"{os.environ['LOCAL_RANK']}.txt").write_text(message, encoding="utf-8")
    else:
        print(f"error: {message}", file=sys.stderr)
    distributed: Any = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        # A process group that is still there is NCCL's, and leaving it at exit would wait for ranks that wait for us.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)
    sys.exit(1)


if __name__ == "__main__":
    main()
