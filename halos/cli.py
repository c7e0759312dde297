"""The command line: ``python scripts/train.py …`` and ``halos train …``; a failed command ends with one clear line."""

from __future__ import annotations

import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException
from omegaconf import DictConfig
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

COMMANDS = ("train", "cache-reference")
COMMAND = "HALOS_COMMAND"
"""The variable in which the processes that DDP launches find the command."""


def config_folder() -> str:
    """The ``conf`` tree: inside an installed package, beside it in a checkout."""
    package = Path(__file__).parent
    inside = package / "conf"
    return str(inside if inside.is_dir() else package.parent / "conf")


def main() -> None:
    """``halos COMMAND [overrides]``."""
    command = sys.argv[1] if len(sys.argv) > 1 else ""
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
    main_cache_reference() if command == "cache-reference" else main_train()


def main_train() -> None:
    """Compose the configuration from the command line and train."""
    end_with_one_line(hydra.main(version_base="1.3", config_path=config_folder(), config_name="train")(_train_job))


def main_cache_reference() -> None:
    """The same command line as for training, to fill the cache of the reference's log-probs."""
    run = hydra.main(version_base="1.3", config_path=config_folder(), config_name="train")
    end_with_one_line(run(_cache_reference_job))


def _train_job(cfg: DictConfig) -> None:
    _place(cfg)
    from halos.train import train  # heavy imports: a misspelt key should not wait for them

    train(cfg)


def _cache_reference_job(cfg: DictConfig) -> None:
    _place(cfg)
    from halos.cache_reference import cache_reference

    cache_reference(cfg)


def _place(cfg: DictConfig) -> None:
    context = HydraConfig.get()
    # In a sweep this is the job's own folder; in a process that DDP launched, that of its parent.
    cfg.output_dir = context.runtime.output_dir
    sweep = context.mode is not None and context.mode.name == "MULTIRUN"
    if sweep and cfg.trainer.devices not in (None, 1):
        raise ValueError(
            f"trainer.devices: a sweep (-m) runs each job on one device, found {cfg.trainer.devices}; "
            "run jobs with several devices one command at a time"
        )
    _require_output_dir(cfg, context.overrides.task)
    # The user's own modules (loss._target_=mylab.losses.MyLoss) lie where the command is run.
    sys.path.insert(0, str(Path.cwd()))


def _require_output_dir(cfg: DictConfig, words: Sequence[str]) -> None:
    # Processes that something else starts (torchrun, srun) would each name a folder after their own clock.
    apart = "TORCHELASTIC_RUN_ID" in os.environ or int(os.environ.get("SLURM_NTASKS", "1")) > 1
    if (apart or cfg.trainer.num_nodes > 1) and not any(word.startswith("output_dir=") for word in words):
        raise ValueError("output_dir: expected one for all processes, as they are started apart; set output_dir=…")


def end_with_one_line(job: Callable[[], Any]) -> None:
    """Do the job; if it fails, the process ends with status 1 and one clear line last."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then lets errors through instead of printing them its own way
    try:
        job()
    except (HydraException, OmegaConfBaseException) as error:
        _fail(explain(error))
    except ValueError as error:
        _fail(str(error))
    except Exception as error:
        traceback.print_exc()
        _fail(f"{type(error).__name__}: {error}")


def explain(error: BaseException) -> str:
    """One line for an error in the configuration, with names that come near a misspelt one."""
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options is not None:
        group, _, name = error.missing_cfg_file.rpartition("/")
        return f"{group}={name}: no such option{_near(name, error.options)}; expected one of {', '.join(error.options)}"
    for cause in _chain(error):
        if isinstance(cause, ConfigKeyError | ConfigAttributeError) and cause.parent_node is not None:
            key = str(cause.full_key or cause.key)
            names = [str(name) for name in cause.parent_node]
            return f"{key}: no such key{_near(key.rpartition('.')[2], names)}"
    last = [cause for cause in _chain(error) if not isinstance(cause, ConfigCompositionException)]
    return " ".join(str(last[-1] if last else error).split())


def _near(name: str, names: Sequence[str]) -> str:
    close = get_close_matches(name, names, n=3, cutoff=0.5)
    return f" (did you mean {' or '.join(close)}?)" if close else ""


def _chain(error: BaseException | None) -> list[BaseException]:
    chain = []
    while error is not None:
        chain.append(error)
        error = error.__cause__
    return chain


def _fail(message: str) -> None:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(1)


if __name__ == "__main__":
    main()
