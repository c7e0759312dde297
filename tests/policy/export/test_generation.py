"""Generation configs: saved as the base has them, without what has no effect."""

from typing import Any

import pytest
from transformers import GenerationConfig

from halos.policy.export.generation import mend, stop_at


@pytest.mark.parametrize(
    "valid", [{}, {"do_sample": True, "temperature": 0.9, "top_p": 0.5}, {"num_beams": 4, "length_penalty": 2.0}]
)
def test_a_valid_config_is_left_as_it_is(valid: dict[str, Any]) -> None:
    config = GenerationConfig(**valid)
    before = config.to_dict()
    assert mend(config) == []
    assert config.to_dict() == before


@pytest.mark.parametrize(
    ("values", "unset"),
    [
        ({"do_sample": False, "temperature": 0.9}, ["temperature=0.9"]),
        ({"temperature": 0.9, "top_p": 0.5, "top_k": 50}, ["temperature=0.9", "top_p=0.5"]),
        ({"do_sample": False, "min_p": 0.1, "typical_p": 0.2}, ["min_p=0.1", "typical_p=0.2"]),
        ({"length_penalty": 2.0, "early_stopping": True}, ["early_stopping=True", "length_penalty=2.0"]),
        ({"do_sample": True, "temperature": 0.9, "length_penalty": 2.0}, ["length_penalty=2.0"]),
        ({"num_beams": 3, "length_penalty": 2.0, "top_k": 9}, ["top_k=9"]),
    ],
)
def test_settings_without_effect_are_unset_and_all_others_kept(
    values: dict[str, Any], unset: list[str], tmp_path: Any
) -> None:
    config = GenerationConfig(**values, eos_token_id=[1, 2], max_new_tokens=7)
    assert mend(config) == unset
    config.save_pretrained(tmp_path)
    names = {name.partition("=")[0] for name in unset}
    for name, value in {**values, "eos_token_id": [1, 2], "max_new_tokens": 7}.items():
        assert getattr(config, name) == (None if name in names else value)


def test_a_config_that_cannot_be_mended_is_refused() -> None:
    with pytest.raises(ValueError, match="num_return_sequences"):
        mend(GenerationConfig(num_return_sequences=3, temperature=0.5))


@pytest.mark.parametrize(("eos", "stops"), [(None, 4), (4, 4), ([4], 4), (1, [1, 4]), ([4, 1], [4, 1])])
def test_the_end_of_a_turn_is_added_once(eos: Any, stops: Any) -> None:
    config = GenerationConfig(eos_token_id=eos)
    for _ in range(2):
        stop_at(config, 4, 0)
    assert config.eos_token_id == stops
    assert config.pad_token_id == 0
