"""Text out of tokens: incremental UTF-8, and stop strings that may begin in one token and end in another. Pure.

The rule is lm-eval's: the output is cut before the first stop string and not stripped.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence


def first_stop(text: str, stop: Sequence[str], start: int = 0) -> int | None:
    """The index of the earliest stop string at or after `start`, or None. Empty stop strings never match."""
    found = [index for item in stop if item and (index := text.find(item, start)) >= 0]
    return min(found) if found else None


class TextBuffer:
    """Collects the bytes of tokens as text and watches for stop strings.

    `text` is everything complete so far; bytes of an unfinished character wait for their rest.
    """

    def __init__(self, stop: Sequence[str] = ()) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._stop = tuple(item for item in stop if item)
        self._longest = max((len(item) for item in self._stop), default=0)
        self._sent = 0
        self.text = ""
        self.stopped = False

    def push(self, piece: bytes) -> bool:
        """Add a token's bytes. True once a stop string is complete: `text` is then cut before it."""
        if self.stopped:
            return True
        scan_from = max(0, len(self.text) - self._longest + 1)
        self.text += self._decoder.decode(piece)
        self._cut(scan_from)
        return self.stopped

    def finish(self) -> str:
        """The final text; an unfinished character becomes U+FFFD."""
        if not self.stopped:
            scan_from = max(0, len(self.text) - self._longest + 1)
            self.text += self._decoder.decode(b"", final=True)
            self._cut(scan_from)
        return self.text

    def take(self) -> str:
        """Text that is safe to show now: not yet taken, and not possibly the beginning of a stop string."""
        end = len(self.text)
        if not self.stopped:
            for size in range(min(self._longest - 1, end - self._sent), 0, -1):
                if any(item.startswith(self.text[end - size :]) for item in self._stop):
                    end -= size
                    break
        new = self.text[self._sent : end]
        self._sent = max(self._sent, end)
        return new

    def rest(self) -> str:
        """What `take` held back, after `finish`."""
        new = self.text[self._sent :]
        self._sent = len(self.text)
        return new

    def _cut(self, scan_from: int) -> None:
        index = first_stop(self.text, self._stop, scan_from)
        if index is not None:
            self.text = self.text[:index]
            self.stopped = True
