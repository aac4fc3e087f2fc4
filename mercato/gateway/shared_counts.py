"""Numbers that the processes of a gateway on one machine share, by key: counts of the requests of a caller.

A table of fixed size in a file without a name, which the processes inherit and map (`new_file`); a single process has
memory of its own. A key is stored as a keyed hash, whose first bytes choose a set of `WAYS` slots. A new key takes the
slot that expires first in its set: so the memory is bounded.

A change is made under a lock of its set (`fcntl`), which takes microseconds. No process waits long for another: where
one loses its processor, or is stopped, while it has the lock, the others give up after `LOCK_ATTEMPTS`, count without
the lock, and may count a request too few.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import mmap
import os
import secrets
import struct
import tempfile
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Final, NamedTuple

SLOTS: Final = 16_384
WAYS: Final = 16
LOCK_ATTEMPTS: Final = 200
"""For a lock that another process has, which it releases within microseconds; a millisecond in all."""

KEY_BYTES: Final = 16
HEADER_BYTES: Final = 64
"""The file begins with the key of its hashes."""
SLOT: Final = struct.Struct(f"={KEY_BYTES}s4d")
SHARED_MEMORY: Final = Path("/dev/shm")  # noqa: S108  # the file gets no name there

Numbers = tuple[float, float, float]
NOTHING: Final[Numbers] = (0.0, 0.0, 0.0)
Change = Callable[[Numbers], "Changed"]
"""Takes the numbers of a key, `NOTHING` for a new one."""


class Changed(NamedTuple):
    """The new numbers of a key, when they may be removed, and how many seconds the caller has to wait, if any."""

    numbers: Numbers
    expires_at: float
    wait: float = 0.0


def new_file() -> int:
    """The descriptor of a file for processes that inherit it. The kernel removes it when the last of them has ended."""
    folder = SHARED_MEMORY if os.access(SHARED_MEMORY, os.W_OK) else None
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        file.write(secrets.token_bytes(HEADER_BYTES))
        file.truncate(HEADER_BYTES + SLOTS * SLOT.size)
        return os.dup(file.fileno())


class SharedCounts:
    """`file`: a descriptor of `new_file`; None: nothing is shared. `clock` is that of the machine.

    `lock_attempts`: how often a lock is tried before a change is made without it.
    """

    def __init__(
        self, clock: Callable[[], float], file: int | None = None, *, lock_attempts: int = LOCK_ATTEMPTS
    ) -> None:
        self._clock = clock
        self._file = file
        self._lock_attempts = lock_attempts
        size = HEADER_BYTES + SLOTS * SLOT.size
        self._memory = mmap.mmap(-1 if file is None else file, size)
        if file is None:
            self._memory[:HEADER_BYTES] = secrets.token_bytes(HEADER_BYTES)
        self._key = bytes(self._memory[:HEADER_BYTES])

    def change(self, key: str, change: Change) -> Changed:
        """Changes the numbers of a key, and gives the result of `change`, which must not wait for anything."""
        digest = hashlib.blake2b(key.encode(), key=self._key, digest_size=KEY_BYTES).digest()
        begin = HEADER_BYTES + int.from_bytes(digest[:4]) % (SLOTS // WAYS) * WAYS * SLOT.size
        with self._locked(begin):
            offset, numbers = self._find(digest, begin)
            changed = change(numbers)
            SLOT.pack_into(self._memory, offset, digest, *changed.numbers, changed.expires_at)
        return changed

    def _find(self, digest: bytes, begin: int) -> tuple[int, Numbers]:
        """The slot of a key in its set, with its numbers; for a new key, the slot that it takes from another."""
        now, first, first_at = self._clock(), begin, float("inf")
        for offset in range(begin, begin + WAYS * SLOT.size, SLOT.size):
            known, *numbers, expires_at = SLOT.unpack_from(self._memory, offset)
            if known == digest:
                return offset, (numbers[0], numbers[1], numbers[2]) if expires_at > now else NOTHING
            if expires_at < first_at:
                first, first_at = offset, expires_at
        return first, NOTHING

    @contextlib.contextmanager
    def _locked(self, begin: int) -> Generator[None]:
        if self._file is None:
            yield
            return
        is_locked = any(self._lock(begin) for _ in range(self._lock_attempts))
        try:
            yield
        finally:
            if is_locked:
                fcntl.lockf(self._file, fcntl.LOCK_UN, 1, begin)

    def _lock(self, begin: int) -> bool:
        assert self._file is not None
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, begin)
        except OSError:
            return False
        return True
