"""Saved configurations are read as plain data, within limits."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from halos.config.nodes import plain
from halos.config.saved import DEEPEST, LONGEST, read_saved
from tests.configs import compose


def written(folder: Path, text: str) -> Path:
    file = folder / "config.yaml"
    file.write_text(text, encoding="utf-8")
    return file


def test_what_a_run_writes_is_read_as_it_was(tmp_path: Path) -> None:
    words = ("loss=mix", "optim.lr=1e-6", "model.chat_template='{{ x }}\n#'", "data.select.labels_from_scores='1e3'")
    cfg = compose(*words, "+loss.note='\u202e\x00 on: &a *b'")
    file = written(tmp_path, OmegaConf.to_yaml(cfg, resolve=True))
    assert read_saved(file) == plain(cfg)


LAUGHS = "a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{last}'] * 9)}]\n" for last, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (LAUGHS, "an anchor or alias in line 1"),
        ("a: {b: *c}", "an anchor or alias in line 1"),
        ("seed: 0\ndata: {label: '${oc.env:HALOS_SECRET}'}", r"an interpolation in line 2, '\$\{oc.env:HALOS_SECRET"),
        ("a: 1\nb: ${a}", "an interpolation in line 2"),
        ("${a}: 1", "an interpolation in line 1"),
        ("a: !!python/object/apply:os.system ['true']", "a tag in line 1"),
        ("a: !!binary aGFsb3M=", "a tag in line 1"),
        ("[" * 100_000, f"more than {DEEPEST} levels in line 1|maximum nesting depth"),  # the latter is PyYAML's own
        ("a:\n" + "".join(f"{' ' * n}- \n" for n in range(1, 400)), "config.yaml"),
        ("a: " + "x" * LONGEST, f"more than {LONGEST:,} bytes"),
        ("a: [", "expected a run's configuration"),
        ("[1, 2]", "no mapping"),
        ("a: 1\na: 2", "duplicate key"),
        ("a: " + "9" * 5000, "config.yaml"),
    ],
)
def test_what_is_no_plain_data_is_refused_quickly(
    text: str, found: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HALOS_SECRET", "a key of mine")
    start = time.perf_counter()
    with pytest.raises(ValueError, match=found) as refused:
        read_saved(written(tmp_path, text))
    assert time.perf_counter() - start < 5
    assert "a key of mine" not in str(refused.value)


def test_other_bytes_and_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    for name in ("bytes.yaml", "none.yaml", "."):
        with pytest.raises(ValueError, match="expected a run's configuration"):
            read_saved(tmp_path / name)


def test_the_longest_file_is_read_within_seconds(tmp_path: Path) -> None:
    lines = "data:\n" + "- {path: /a/b, weight: 1.5, on: true}\n" * (LONGEST // 38 - 1)
    start = time.perf_counter()
    assert len(read_saved(written(tmp_path, lines))["data"]) > 6000
    assert time.perf_counter() - start < 60
