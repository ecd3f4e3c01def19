"""Walk the header of a GGUF file without believing its counts: no loop longer than the file."""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import BinaryIO

#: Bytes of a value by its type's number; 8 is text, 9 an array.
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_TEXT, _ARRAY = 8, 9
_MOST_DIMS = 8


def check_gguf_header(file: Path) -> None:
    """Make sure that every count and length in the header fits into the file.

    Readers that trust them count to 2**64, or ask for that much memory.

    Raises:
        ValueError: one does not.
        OSError: the file cannot be read.
    """
    with file.open("rb") as stream:
        walk = _Walk(stream, os.fstat(stream.fileno()).st_size)
        if walk.take(4) != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        version = walk.number("<I")
        if version not in (2, 3):
            raise ValueError(f"GGUF version {version} is not read, 2 and 3 are")
        n_tensors, n_fields = walk.number("<Q"), walk.number("<Q")
        for _ in range(n_fields):
            walk.text()
            walk.value(walk.number("<I"))
        for _ in range(n_tensors):
            walk.text()
            n_dims = walk.number("<I")
            if n_dims > _MOST_DIMS:
                raise ValueError(f"a tensor has {n_dims} dimensions")
            walk.take(8 * n_dims + 4 + 8)  # sizes, type, place


class _Walk:
    """A file that is read forward, and never beyond its end."""

    def __init__(self, stream: BinaryIO, size: int) -> None:
        self._stream = stream
        self._left = size

    def take(self, n_bytes: int) -> bytes:
        """Return the next bytes."""
        self._spend(n_bytes)
        return self._stream.read(n_bytes)

    def number(self, form: str) -> int:
        """Return the next number of a format of `struct`."""
        (found,) = struct.unpack(form, self.take(struct.calcsize(form)))
        return int(found)

    def text(self) -> None:
        """Pass over a text."""
        self._skip(self.number("<Q"))

    def value(self, kind: int, *, in_array: bool = False) -> None:
        """Pass over a value."""
        if kind == _TEXT:
            self.text()
        elif kind in _SIZES:
            self._skip(_SIZES[kind])
        elif kind == _ARRAY and not in_array:
            inner, count = self.number("<I"), self.number("<Q")
            if inner in _SIZES:
                self._skip(_SIZES[inner] * count)
            else:
                # Each takes the eight bytes of its length, so that the file's end ends the loop.
                for _ in range(count):
                    self.value(inner, in_array=True)
        else:
            raise ValueError(f"a value is of type {kind}")

    def _skip(self, n_bytes: int) -> None:
        self._spend(n_bytes)
        self._stream.seek(n_bytes, os.SEEK_CUR)

    def _spend(self, n_bytes: int) -> None:
        if n_bytes > self._left:
            raise ValueError(f"it ends {n_bytes - self._left:,} bytes before its header does")
        self._left -= n_bytes
