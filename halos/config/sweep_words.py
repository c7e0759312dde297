"""Settings that concern all jobs of a sweep: the names of its folders, and the repositories for its models."""

from collections.abc import Sequence

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

PUSH = "hub.push"


def named_by_what_is_swept(settings: Sequence[str]) -> str:
    """Return a setting of Hydra that names the folders of a sweep after the swept keys only."""
    parser = OverridesParser.create()
    overrides = [parser.parse_override(setting) for setting in settings if "=" in setting]
    swept = {override.key_or_group for override in overrides if override.is_sweep_override()}
    same = [key for override in overrides if not ((key := override.key_or_group) in swept or key.startswith("hydra."))]
    excluded = dict.fromkeys(("output_dir", "overwrite", *same))
    return f"hydra.job.config.override_dirname.exclude_keys=[{','.join(excluded)}]"


def check_pushed(settings: Sequence[str]) -> None:
    """Raise ``ValueError`` if all jobs of a sweep would push their models to the same repository."""
    for setting in settings:
        key, _, name = setting.partition("=")
        override = OverridesParser.create().parse_override(setting) if key == PUSH else None
        if override is not None and not override.is_sweep_override() and override.value() is not None:
            _check_own_repository(name)


def check_pushed_alone(cfg: DictConfig) -> None:
    """Check a repository that a configuration file names, for a job of a sweep.

    :func:`check_pushed` checks only the command line.
    """
    context = HydraConfig.get()
    named = any(word.startswith(f"{PUSH}=") for word in context.overrides.task)
    push = OmegaConf.to_container(cfg.hub, resolve=False)["push"]  # type: ignore[call-overload,index]  # a dictionary
    if context.mode is RunMode.MULTIRUN and push is not None and not named:
        _check_own_repository(push)


def _check_own_repository(name: str) -> None:
    if "${" not in name:
        expected = f"a repository for each job of a sweep, such as '{PUSH}={name}-${{loss.name}}-${{seed}}'"
        raise ValueError(f"{PUSH}: expected {expected}, found {name} for all")
