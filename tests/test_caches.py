"""Which entries of a cache folder may be used."""

import stat
from pathlib import Path

import pytest

from halos.caches import PRIVATE, Refused, Seals
from tests.owners import as_if_owned_by_another


def key_file(folder: Path, content: bytes = b"k" * 32, mode: int = 0o640) -> Path:
    file = folder / "key"
    file.write_bytes(content)
    file.chmod(mode)
    return file


def test_a_seal_belongs_to_one_text_and_one_key(tmp_path: Path) -> None:
    all_seals = [PRIVATE, Seals.of_file(key_file(tmp_path)), Seals(b"x" * 32)]
    made = {seals.seal(text) for seals in all_seals for text in ("a", "b")}
    assert len(made) == 6
    for seals in all_seals:
        seals.check(seals.seal("a"), "a")
        for wrong in (made - {seals.seal("a")}) | {None, 3, "ü"}:
            with pytest.raises(ValueError, match=r"its checksum does not fit|not sealed with cache_key_file"):
                seals.check(wrong, "a")
    assert len({seals.suffix for seals in all_seals}) == 3
    assert "kkkk" not in repr(all_seals), "the key is not printed"


@pytest.mark.parametrize(
    ("content", "mode", "reason"),
    [
        (b"k" * 31, 0o640, r"expected 32 random bytes or more, found 31; make one with head -c 32 /dev/urandom > "),
        (b"k" * 32, 0o644, r"expected a file that only its group can read, found .*; run chmod 640"),
        (b"k" * 32, 0o660, r"expected a file that only its group can read, found .*; run chmod 640"),
    ],
)
def test_a_key_that_is_none_is_refused(content: bytes, mode: int, reason: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"^cache_key_file: {reason}"):
        Seals.of_file(key_file(tmp_path, content, mode))
    with pytest.raises(ValueError, match=r"^cache_key_file: cannot be read: .*none: No such file"):
        Seals.of_file(tmp_path / "none")


def test_a_private_cache_is_made_for_its_owner_alone(tmp_path: Path) -> None:
    folder = PRIVATE.make_folder(tmp_path / "home" / "cache", "a", "b")
    assert folder == tmp_path / "home" / "cache" / "a" / "b"
    modes = [stat.S_IMODE(path.stat().st_mode) for path in (folder, folder.parent, folder.parent.parent)]
    assert modes == [0o700] * 3
    assert stat.S_IMODE((tmp_path / "home").stat().st_mode) != 0o700


@pytest.mark.parametrize("mode", [0o720, 0o702, 0o777, 0o1777])
def test_what_others_could_have_written_is_refused_by_mode(mode: int, tmp_path: Path) -> None:
    PRIVATE.check_owner(tmp_path)
    tmp_path.chmod(mode)
    with pytest.raises(Refused, match=f"could have been written by another user .*mode {mode:04o}"):
        PRIVATE.check_owner(tmp_path)
    Seals(b"k" * 32).check_owner(tmp_path)


def test_what_others_have_written_is_refused_by_owner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    as_if_owned_by_another(tmp_path, monkeypatch)
    with pytest.raises(Refused, match=r"could have been written by another user \(owner \d+, mode 0700\)"):
        PRIVATE.check_owner(tmp_path)
