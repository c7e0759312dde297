"""The command line: ``python scripts/train.py …`` and ``halos train …``; a failed command ends with one clear line."""

from __future__ import annotations

import errno
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, cast

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from halos.errors import RunFailed
from halos.launch import ERRORS, die_with_parent, ranks_to_start, run_ranks
from halos.signals import caught

COMMANDS = ("train", "cache-reference")
COMMAND = "HALOS_COMMAND"
"""The variable in which other processes of a run find the command."""


def config_folder() -> str:
    """The ``conf`` tree: inside an installed package, beside it in a checkout."""
    package = Path(__file__).parent
    inside = package / "conf"
    return str(inside if inside.is_dir() else package.parent / "conf")


def main() -> None:
    """``halos COMMAND [overrides]``."""
    command = sys.argv[1] if len(sys.argv) > 1 else ""
    if command == "rank" and len(sys.argv) == 3:  # one of several that halos.launch has started
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
    main_cache_reference() if command == "cache-reference" else main_train()


def main_train() -> None:
    """Compose the configuration from the command line and train."""
    _main("train")


def main_cache_reference() -> None:
    """The same command line as for training, to fill the cache of the reference's log-probs."""
    _main("cache-reference")


def _main(command: str) -> None:
    os.environ[COMMAND] = command
    name_jobs_by_what_is_swept(sys.argv)
    end_with_one_line(hydra.main(version_base="1.3", config_path=config_folder(), config_name="train")(_job))


def _job(cfg: DictConfig) -> None:
    _place(cfg)
    # In a sweep too, where this process goes on to the next job, several devices have their own processes.
    if (count := ranks_to_start(cfg)) > 1:
        run_ranks(cfg, count)
    else:
        _run(cfg)


def _place(cfg: DictConfig) -> None:
    cfg.output_dir = HydraConfig.get().runtime.output_dir  # in a sweep the job's own folder


def _rank_job(config: Path) -> None:
    die_with_parent()
    _run(cast("DictConfig", OmegaConf.load(config)))


def _run(cfg: DictConfig) -> None:
    # The user's own modules (loss._target_=mylab.losses.MyLoss) lie where the command is run.
    sys.path.insert(0, str(Path.cwd()))
    # Heavy imports: a misspelt key should not wait for them.
    if os.environ.get(COMMAND) == "cache-reference":
        from halos.cache_reference import cache_reference

        cache_reference(cfg)
    else:
        from halos.train import train

        train(cfg)


def name_jobs_by_what_is_swept(words: list[str]) -> None:
    """Keep what is the same for all jobs of a sweep out of the names of their folders."""
    if not {"-m", "--multirun"} & set(words):
        return
    parser = OverridesParser.create()
    given = [parser.parse_override(word) for word in words[1:] if "=" in word and not word.startswith("-")]
    same = [o.key_or_group for o in given if not o.is_sweep_override() and not o.key_or_group.startswith("hydra.")]
    kept = ["output_dir", "overwrite", *same]
    # Among the other overrides: Hydra's parser takes them in one stretch only.
    place = max(n for n, word in enumerate(words) if n == 0 or ("=" in word and not word.startswith("-")))
    words.insert(place + 1, f"hydra.job.config.override_dirname.exclude_keys=[{','.join(dict.fromkeys(kept))}]")


def end_with_one_line(job: Callable[[], Any]) -> None:
    """Do the job; if it fails, the process ends with status 1 and one clear line last."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then lets errors through instead of printing them its own way
    try:
        with caught():
            job()
    except (HydraException, OmegaConfBaseException) as error:
        _fail(explain(error))
    except (ValueError, RunFailed) as error:
        _fail(str(error))
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            traceback.print_exc()
        _fail(f"{type(error).__name__}: {error}")
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
    if folder := os.environ.get(ERRORS):  # of a rank: the process that watches it says it, once
        Path(folder, f"{os.environ['LOCAL_RANK']}.txt").write_text(message, encoding="utf-8")
        sys.exit(1)
    print(f"error: {message}", file=sys.stderr)
    sys.exit(1)


if __name__ == "__main__":
    main()
