"""Values that make no sense are refused by key."""

import pytest

from halos.config.values import WHOLE, check_values
from tests.configs import compose


def test_the_defaults_make_sense() -> None:
    check_values(compose("output_dir=out"))
    check_values(compose("output_dir=out", "trainer.max_epochs=null", "trainer.gradient_clip_val=null"))
    check_values(compose("output_dir=out", "trainer.max_epochs=0.5", "trainer.max_time='00:12:00:00'"))


@pytest.mark.parametrize("key", WHOLE)
@pytest.mark.parametrize("value", ["null", "1.5", "abc", "true", "-2"])
def test_whole_numbers_are_expected(key: str, value: str) -> None:
    with pytest.raises(ValueError, match=rf"^{key}: expected a whole number from {WHOLE[key]} on, found "):
        check_values(compose("output_dir=out", f"{key}={value}"))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("seed=4294967296",), r"^seed: expected a whole number below 2\^32, found 4294967296"),
        (("cache_dir=null",), "^cache_dir: expected a folder, found None"),
        (("output_dir=3",), "^output_dir: expected a folder, found 3"),
        (("trainer.gradient_clip_val=-1",), "^trainer.gradient_clip_val: expected a number from 0 on or"),
        (("trainer.max_epochs=abc",), "^trainer.max_epochs: expected a number from 0 on or null, found 'abc'"),
        (("trainer.max_time=5",), "^trainer.max_time: expected DD:HH:MM:SS, such as 00:12:00:00, found 5"),
        (("+trainer.precision=bf16-mixed",), "^trainer.precision: expected precision=…, found trainer.precision=bf16"),
    ],
)
def test_other_values_are_refused(words: tuple[str, ...], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        check_values(compose("output_dir=out", *words))
