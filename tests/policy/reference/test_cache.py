"""What is kept of the reference, and what is refused."""

import json
import logging
import os
import stat
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from halos.caches import PRIVATE, Seals
from halos.policy.reference.cache import FORMAT, ReferenceCache, model_key
from tests import tiny
from tests.owners import as_if_owned_by_another

ENTRIES = {bytes([n] * 16): torch.linspace(-3, -1, n + 1) for n in range(5)}
MODEL = "a" * 64


def same(left: Mapping[bytes, Tensor], right: Mapping[bytes, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


@pytest.fixture
def cache(tmp_path: Path) -> ReferenceCache:
    made = ReferenceCache(tmp_path, MODEL)
    made.write(ENTRIES)
    return made


def part(cache: ReferenceCache) -> Path:
    (path,) = cache.folder.iterdir()
    return path


# Reading and writing


def test_what_is_written_is_read(cache: ReferenceCache) -> None:
    assert same(cache.read(), ENTRIES)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's account of memory")
def test_numbers_stay_in_the_file(tmp_path: Path) -> None:
    made = ReferenceCache(tmp_path, MODEL)
    path = made.write({bytes([n] * 16): torch.rand(1 << 20) for n in range(16)})  # 64 MiB
    assert path is not None
    before = own_memory()
    entries = made.read()
    assert sum(len(entry) for entry in entries.values()) == 16 << 20
    assert own_memory() - before < 16 << 10
    assert same(entries, load_entries(path))


def own_memory() -> int:
    """KiB that are not pages of files."""
    told = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(told["RssAnon"].split()[0])


def load_entries(path: Path) -> dict[bytes, Tensor]:
    found = load_file(path)
    return {bytes(key.tolist()): found["logprobs"][n << 20 : (n + 1) << 20] for n, key in enumerate(found["keys"])}


def test_parts_add_up(cache: ReferenceCache) -> None:
    more = {b"m" * 16: torch.tensor([-0.5])}
    cache.write(more)
    assert same(cache.read(), ENTRIES | more)
    cache.write(more)
    assert len(list(cache.folder.iterdir())) == 2


def test_models_are_kept_apart(cache: ReferenceCache, tmp_path: Path) -> None:
    assert ReferenceCache(tmp_path, "b" * 64).read() == {}


def test_an_empty_folder_has_nothing(tmp_path: Path) -> None:
    assert ReferenceCache(tmp_path / "none", MODEL).read() == {}


@pytest.mark.parametrize("error", [OSError, SafetensorError])
def test_a_write_that_fails_leaves_nothing_and_says_so(
    error: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(tensors: Any, path: Path, metadata: Any) -> None:
        path.write_bytes(b"as far as it went")
        raise error("no space left")

    monkeypatch.setattr("halos.policy.reference.cache.save_file", full)
    made = ReferenceCache(tmp_path, MODEL)
    made.write(ENTRIES)
    assert not list(made.folder.iterdir())
    assert "could not be kept" in caplog.text
    assert "no space left" in caplog.text


# Refusal


def rewrite(path: Path, metadata: dict[str, str] | None = None, **changed: Tensor) -> None:
    told = json.loads(path.read_bytes()[8 : 8 + struct.unpack("<Q", path.read_bytes()[:8])[0]])["__metadata__"]
    save_file(load_file(path) | changed, path, told | (metadata or {}))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("harm", ["owner", "mode", "mode of the folder", "owner of the folder"])
def test_numbers_that_another_user_could_have_written_are_refused(
    harm: str, cache: ReferenceCache, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = part(cache)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(cache.folder.stat().st_mode) == stat.S_IMODE(cache.folder.parent.stat().st_mode) == 0o700
    # With a checksum that is recomputed, as everybody can.
    zeros = {**load_file(path), "logprobs": torch.zeros(15)}
    text = cache._sealed_text(zeros)
    save_file(zeros, path, {"format": FORMAT, "model": MODEL, "checksum": PRIVATE.seal(text)})
    assert cache.read(), "a private cache trusts its owner"
    changed = cache.folder if harm.endswith("folder") else path
    if harm.startswith("mode"):
        changed.chmod(0o770)
    else:
        as_if_owned_by_another(changed, monkeypatch)
    assert cache.read() == {}
    assert "could have been written by another user" in caplog.text
    assert path.exists(), "nobody's is deleted"


def test_parts_under_the_groups_key_are_used_and_others_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = ReferenceCache(tmp_path, MODEL, Seals(b"k" * 32))
    earlier = os.umask(0o002)
    try:
        written = ours.write(ENTRIES)
    finally:
        os.umask(earlier)
    assert written is not None
    assert [stat.S_IMODE(path.stat().st_mode) for path in (written, ours.folder)] == [0o664, 0o775]
    as_if_owned_by_another(written, monkeypatch)
    ours.folder.chmod(0o777)
    assert same(ours.read(), ENTRIES)
    for other in (PRIVATE, Seals(b"x" * 32)):
        ours.folder.chmod(0o700)
        stranger = ReferenceCache(tmp_path, MODEL, other)
        assert stranger.read() == {}
        stranger.write({key: torch.zeros(3) for key in (b"f" * 16, *ENTRIES)})
    assert len(list(ours.folder.iterdir())) == 3
    assert same(ours.read(), ENTRIES)
    assert len(list(ours.folder.iterdir())) == 3, "nobody's is deleted"


def test_a_user_does_not_replace_another_users_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = ReferenceCache(tmp_path, MODEL, Seals(b"k" * 32))
    ours.write(ENTRIES)
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    ours.write(ENTRIES)
    assert len(list(ours.folder.iterdir())) == 2


DAMAGES = {
    "cut off": cut,
    "a bit flipped": flip,
    "empty": lambda path: path.write_bytes(b""),
    "garbage": lambda path: path.write_bytes(b"not safetensors at all"),
    "another model": lambda path: rewrite(path, {"model": "b" * 64}),
    "another version": lambda path: rewrite(path, {"format": "0"}),
    "other numbers": lambda path: rewrite(path, logprobs=torch.zeros(15)),
    "other keys": lambda path: rewrite(path, keys=torch.zeros(5, 16, dtype=torch.uint8)),
    "other lengths": lambda path: rewrite(path, lengths=torch.tensor([5, 4, 3, 2, 1])),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_part_is_refused_removed_and_can_be_made_anew(
    damage: str, cache: ReferenceCache, caplog: pytest.LogCaptureFixture
) -> None:
    other = {b"m" * 16: torch.tensor([-0.5])}
    path = part(cache)
    cache.write(other)
    DAMAGES[damage](path)
    with caplog.at_level(logging.WARNING, logger="halos"):
        assert same(cache.read(), other)
    assert f"{path} are refused" in caplog.text
    assert not path.exists()
    cache.write(ENTRIES)
    assert same(cache.read(), ENTRIES | other)


# Keys


def test_the_key_of_a_model_is_that_of_its_numbers(tmp_path: Path) -> None:
    model = tiny.model()
    key = model_key(model, "32-true")
    assert model_key(tiny.model(), "32-true") == key
    model.save_pretrained(tmp_path)
    assert model_key(type(model).from_pretrained(tmp_path), "32-true") == key


@pytest.mark.parametrize("change", ["weight", "precision", "config", "dtype", "attention"])
def test_whatever_changes_its_numbers_changes_the_key(change: str) -> None:
    model, precision = tiny.model(), "32-true"
    key = model_key(model, precision)
    if change == "weight":
        with torch.no_grad():
            model.model.layers[1].mlp.up_proj.weight[3, 2] += 1e-6
    elif change == "precision":
        precision = "bf16-mixed"
    elif change == "config":
        model.config.rms_norm_eps = 1e-3
    elif change == "dtype":
        model = model.double()
    else:
        model = tiny.model(num_key_value_heads=2)
    assert model_key(model, precision) != key


def test_bf16_weights_have_a_key() -> None:
    assert model_key(tiny.model(dtype=torch.bfloat16), "bf16-true") != model_key(tiny.model(), "bf16-true")
