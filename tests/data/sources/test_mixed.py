"""Mixtures: weights, caps, and what cannot be mixed."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from halos.data.sources.mixed import MixedSource, shares


def write(path: Path, count: int) -> str:
    path.write_text("".join(json.dumps({"prompt": f"{path.stem} {n}", "completion": "a"}) + "\n" for n in range(count)))
    return str(path)


def counts(mix: Any, seed: int = 0) -> dict[str, int]:
    source = MixedSource(mix, seed)
    records = source.train().records
    return {name: sum(str(r.prompt).startswith(f"{name} ") for r in records) for name in mix}


@pytest.mark.parametrize(
    ("available", "weights", "expected"),
    [
        ({"a": 10, "b": 100}, {"a": 1, "b": 1}, {"a": 10, "b": 10}),
        ({"a": 10, "b": 100}, {"a": 1, "b": 3}, {"a": 10, "b": 30}),
        ({"a": 10, "b": 12}, {"a": 1, "b": 3}, {"a": 4, "b": 12}),
        ({"a": 100, "b": 1}, {"a": 0.999, "b": 0.001}, {"a": 100, "b": 1}),
    ],
)
def test_shares_are_as_large_as_the_weights_allow(
    available: dict[str, int], weights: dict[str, float], expected: dict[str, int]
) -> None:
    assert shares(available, weights) == expected


def test_weights_caps_and_neither(tmp_path: Path) -> None:
    files = {name: write(tmp_path / f"{name}.jsonl", 20) for name in "abcd"}
    mix: dict[str, Any] = {
        "a": {"train": files["a"], "weight": 1},
        "b": {"train": files["b"], "weight": 2, "cap": 8},
        "c": {"train": files["c"], "cap": 3},
        "d": {"train": files["d"]},
    }
    assert counts(mix) == {"a": 4, "b": 8, "c": 3, "d": 20}
    left_out = {name: f"filtered: records of {name} beyond its cap or share" for name in "abc"}
    expected = Counter({left_out["a"]: 16, left_out["b"]: 12, left_out["c"]: 17})
    assert MixedSource(mix).train().dropped == expected
    chosen = [MixedSource(mix, seed).train().records for seed in (0, 0, 1)]
    assert chosen[0] == chosen[1] != chosen[2]
    found = MixedSource(mix | {"a": {"train": files["a"], "val": files["d"]}})
    assert len(found.train().origins) == 4
    validation = found.val()
    assert validation is not None
    assert (len(validation.records), validation.dropped) == (20, Counter())
    assert MixedSource(mix).val() is None


@pytest.mark.parametrize(
    ("mix", "said"),
    [
        (None, "data=mix needs data.mix="),
        ({"a": {"data": "shq", "train": "x"}}, "data.mix.a.data: expected one of files, hh, shp"),
        ({"a": {}}, "data.mix.a: data=files needs data.train=FILE"),
        ({"a": {"train": "x", "min_ratio": 2}}, "data.mix.a: files does not take these settings"),
        ({"a": {"train": "x", "weight": 0}}, "data.mix.a.weight: expected a number above 0, found 0"),
        ({"a": {"train": "x", "cap": 1.5}}, "data.mix.a.cap: expected a whole number from 1 on, found 1.5"),
        ({"a": {"train": "x", "cap": True}}, "data.mix.a.cap: expected a whole number from 1 on, found True"),
        ({"a": {"train": "x", "weight": True}}, "data.mix.a.weight: expected a number from 0 on, found True"),
        ({"a": {"train": "x", "data": []}}, r"data.mix.a.data: expected one of files, .* found \[\]"),
    ],
)
def test_mixtures_that_make_no_sense(mix: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        MixedSource(mix)


def test_one_file_in_two_sources(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", 2)
    with pytest.raises(ValueError, match=r"data.mix: .*: expected ids to be unique; found .*, as at "):
        MixedSource({"a": {"train": file}, "b": {"train": file}}).train()


def test_a_mixture_is_no_stream(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data.streaming: expected one source, found data=mix"):
        MixedSource({"a": {"train": write(tmp_path / "a.jsonl", 2)}}).check_stream()
