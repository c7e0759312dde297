"""Which entries of a cache folder may be used: those of this user, or those sealed with a key that a group shares.

Without a key a cache is private. Its folders have mode 0700, and what another user could have written is refused, by
owner and mode. With a key file an entry carries an HMAC under the key. Entries without it are ignored, and left to
their owners; owner and mode do not matter then, and modes follow the umask.
"""

import hashlib
import hmac
import os
import stat
from dataclasses import dataclass, field
from pathlib import Path

from halos.files import in_home

KEY_BYTES = 32


class Refused(ValueError):
    """An entry or a folder of a cache that another user could have written."""


@dataclass(frozen=True, slots=True)
class Seals:
    """Makes and checks the seals of a cache's entries: checksums, or HMACs under a shared key.

    Attributes:
        key: the shared key; None for a private cache.
    """

    key: bytes | None = field(default=None, repr=False)

    @classmethod
    def of_file(cls, file: str | Path | None) -> "Seals":
        """Read the key from a file; None or an empty name for a private cache.

        Raises:
            ValueError: the file cannot be read, is short, or is open to users outside its group.
        """
        if not file:
            return cls()
        path = in_home(file)
        try:
            mode, key = path.stat().st_mode, path.read_bytes()
        except OSError as error:
            raise ValueError(f"cache_key_file: cannot be read: {file}: {error.strerror}") from None
        if len(key) < KEY_BYTES:
            hint = f"make one with head -c {KEY_BYTES} /dev/urandom > {file}"
            raise ValueError(f"cache_key_file: expected {KEY_BYTES} random bytes or more, found {len(key)}; {hint}")
        if mode & stat.S_IRWXO or mode & stat.S_IWGRP:
            hint = f"run chmod 640 {file}"
            raise ValueError(f"cache_key_file: expected a file that only its group can read, found {file}; {hint}")
        return cls(key)

    @property
    def private(self) -> bool:
        """Whether only one user's entries are used, as there is no shared key."""
        return self.key is None

    @property
    def suffix(self) -> str:
        """Part of the names of entries: a fingerprint of the key, to keep different keys apart; empty without a key."""
        return "" if self.key is None else f"-{self.seal('name')[:8]}"

    def seal(self, text: str) -> str:
        """Return the checksum of a text, or its HMAC under the key."""
        if self.key is None:
            return hashlib.sha256(text.encode()).hexdigest()
        return hmac.new(self.key, text.encode(), hashlib.sha256).hexdigest()

    def check(self, seal: object, text: str) -> None:
        """Raise ``ValueError`` unless the seal is that of the text."""
        if not isinstance(seal, str) or not hmac.compare_digest(seal.encode(), self.seal(text).encode()):
            raise ValueError("its checksum does not fit" if self.private else "it is not sealed with cache_key_file")

    def make_folder(self, root: Path, *names: str) -> Path:
        """Make the cache's root and folders inside each other, and return the last one."""
        root.parent.mkdir(parents=True, exist_ok=True)
        for path in (root, *(root.joinpath(*names[: n + 1]) for n in range(len(names)))):
            path.mkdir(mode=0o700 if self.private else 0o777, exist_ok=True)
        return root.joinpath(*names)

    def check_owner(self, *paths: Path) -> None:
        """Raise :class:`Refused` for a path that another user could have written; never with a key.

        The administrator may write everything anyway.
        """
        for path in paths if self.private else ():
            status = path.stat()
            writable = status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
            if status.st_uid not in (0, os.geteuid()) or writable:
                permissions = f"owner {status.st_uid}, mode {stat.S_IMODE(status.st_mode):04o}"
                hint = "remove it, or run chmod go-w, or share the cache with cache_key_file"
                raise Refused(f"{path} could have been written by another user ({permissions}); {hint}")


PRIVATE = Seals()
