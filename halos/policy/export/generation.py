"""The generation config of an exported policy: the base's own, which also stops at the end of a turn."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import GenerationConfig

_SAMPLING = {
    "temperature": 1.0, "top_p": 1.0, "top_k": 50, "min_p": None, "top_h": None, "typical_p": 1.0,
    "epsilon_cutoff": 0.0, "eta_cutoff": 0.0,
}  # fmt: skip
_BEAMS = {"early_stopping": False, "length_penalty": 1.0}
"""Flags that have no effect without sampling or beams, and the values that mean the same as no value."""


def mend(config: GenerationConfig) -> list[str]:
    """Unset flags without effect, in place. transformers refuses to save them: a temperature without sampling, say.

    Returns:
        The flags that were unset, as ``name=value``. A config that can be saved is not changed.

    Raises:
        ValueError: transformers refuses the config for another reason.
    """
    if _is_valid(config):
        return []
    without_effect = ({} if config.do_sample is True else _SAMPLING) | ({} if (config.num_beams or 1) > 1 else _BEAMS)
    unset = []
    for name, neutral in without_effect.items():
        value = getattr(config, name, None)
        if value not in (None, neutral):
            unset.append(f"{name}={value}")
            setattr(config, name, None)
    config.validate(strict=True)
    return unset


def _is_valid(config: GenerationConfig) -> bool:
    try:
        config.validate(strict=True)
    except ValueError:
        return False
    return True


def stop_at(config: GenerationConfig, end_of_turn: int, pad: int | None) -> None:
    """Add the end of a turn to the tokens at which generation stops, in place, and set a missing padding token."""
    stops = config.eos_token_id
    stops = [stops] if isinstance(stops, int) else list(stops or ())
    if end_of_turn not in stops:
        stops.append(end_of_turn)
    config.eos_token_id = stops if len(stops) > 1 else stops[0]
    if config.pad_token_id is None:
        config.pad_token_id = pad
