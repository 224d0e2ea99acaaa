"""Reads the first bytes of a file, as far as a GGUF header asks for them and never beyond a limit.

Owns the buffer, the position and the limits on bytes and strings. It knows nothing of what the bytes mean: see
`joulemark.gguf_header`. The file is read, not mapped: a file that shrinks under a mapping kills the process.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from typing import Any

MAX_HEADER_BYTES = 32 << 20
"""All metadata and tensor descriptions; the largest vocabularies (262,144 tokens, 514,906 merges) need some 16 MB."""
MAX_ARRAY_STRINGS = 1 << 20
"""Strings in all arrays together: each must be stepped over, which takes some 0.15 µs."""
MAX_STRING_BYTES = 16 << 20

LENGTH = struct.Struct("<Q")
_READ_BYTES = 1 << 20


class HeaderError(Exception):
    """Why the file is not acceptable; `joulemark.gguf_header` turns it into ModelRejected."""


class HeaderBytes:
    """The first bytes of a file, read as far as they are needed and never beyond MAX_HEADER_BYTES."""

    def __init__(self, descriptor: int, size: int) -> None:
        self.size = size
        self.position = 0
        self.kept_bytes = 0
        self.array_strings = 0
        self._descriptor = descriptor
        self._limit = min(size, MAX_HEADER_BYTES)
        self._buffer = bytearray()

    def need(self, count: int, what: str) -> None:
        """Makes sure that `count` bytes lie at the position."""
        end = self.position + count
        if end > self.size:
            raise HeaderError(f"it ends within {what} (byte {self.size})")
        if end > self._limit:
            raise HeaderError(f"{what} reaches beyond the first {MAX_HEADER_BYTES} bytes")
        while len(self._buffer) < end:
            wanted = min(max(end - len(self._buffer), _READ_BYTES), self._limit - len(self._buffer))
            chunk = os.pread(self._descriptor, min(wanted, 4 * _READ_BYTES), len(self._buffer))
            if not chunk:
                raise HeaderError(f"it became shorter while {what} was read")
            self._buffer += chunk

    def unpack(self, form: struct.Struct, what: str) -> tuple[Any, ...]:
        """The next numbers."""
        self.need(form.size, what)
        values = form.unpack_from(self._buffer, self.position)
        self.position += form.size
        return values

    def take(self, count: int, what: str) -> bytes:
        """The next `count` bytes."""
        self.need(count, what)
        data = bytes(self._buffer[self.position : self.position + count])
        self.position += count
        return data

    def skip(self, count: int, what: str) -> None:
        """Steps over `count` bytes."""
        self.need(count, what)
        self.position += count

    def skip_strings(self, count: int, what: str) -> None:
        """Steps over `count` strings."""
        self.array_strings += count
        if self.array_strings > MAX_ARRAY_STRINGS:
            raise HeaderError(f"its arrays hold more than {MAX_ARRAY_STRINGS} strings ({what})")
        done = 0
        while done < count:
            done += self._step(count - done)
            if done < count:
                self.need(8, what)  # the buffer ended here: read on, or refuse
                (length,) = LENGTH.unpack_from(self._buffer, self.position)
                if length > MAX_STRING_BYTES:
                    raise HeaderError(f"{what} has a string of {length} bytes")
                self.need(8 + length, what)

    def _step(self, count: int) -> int:
        """Steps over whole strings that lie in the buffer and says over how many: the hot loop, 0.15 µs a string."""
        buffer, unpack, end = self._buffer, LENGTH.unpack_from, len(self._buffer)
        position = self.position
        done = 0
        try:
            for done in range(count):
                after = position + 8 + unpack(buffer, position)[0]
                if after > end:
                    return done
                position = after
        except struct.error:  # fewer than eight bytes are left in the buffer
            return done
        finally:
            self.position = position
        return count

    def since(self, start: int) -> Iterator[bytes]:
        """The bytes from `start` to the position, in pieces."""
        for begin in range(start, self.position, _READ_BYTES):
            yield bytes(self._buffer[begin : min(begin + _READ_BYTES, self.position)])
