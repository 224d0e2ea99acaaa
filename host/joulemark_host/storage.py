"""Where the shelf's bytes lie: in a folder of this machine, or in object storage by URL (S3 and what speaks its protocol).

A name is `folder/…`, already checked by the shelf, and what is under a name never changes: it is there whole or not at all. Keys for object
storage come from the provider's own environment variables (AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL, …), never from a command line. Not aware of
artifacts. Sizes are in bytes.
"""

from __future__ import annotations

import shutil
import threading
from collections import OrderedDict
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

from joulemark import durable
from joulemark.errors import BadInput, MissingExtra, NoSpace, Unavailable
from joulemark.packs import MAX_PACK_BYTES

BLOCK = 1 << 20
RESERVE_BYTES = 64 * 2**20
"""Left free on the disk, so that the record database can still grow."""
CACHED_BYTES = 256 * 1024
"""Manifests are smaller; packs are read each time, so that the memory stays small."""
CACHED = 1024
RETRY_S = 30.0


class Storage(Protocol):
    """See the module. Safe to use from several threads."""

    def size(self, name: str) -> int | None:
        """How many bytes are under this name; None when nothing is."""
        ...

    def read(self, name: str) -> bytes:
        """All of a small file. Raises FileNotFoundError."""
        ...

    def blocks(self, name: str, start: int, end: int) -> Iterator[bytes]:
        """The bytes from `start` to before `end`. Raises FileNotFoundError."""
        ...

    def write(self, name: str, size_bytes: int, pieces: Iterable[bytes]) -> None:
        """Stores `pieces`, durably and whole; nothing when they raise. Raises NoSpace, Unavailable."""
        ...

    def names(self, folder: str) -> list[str]:
        """The names of what is directly in a folder, without the folder."""
        ...

    def path(self, name: str) -> Path | None:
        """Where the file lies on this machine; None for what lies elsewhere."""
        ...


def open_storage(where: str | Path) -> Storage:
    """A folder, or the URL of object storage such as s3://bucket/prefix. Raises BadInput, MissingExtra, Unavailable."""
    return ObjectStorage(where) if isinstance(where, str) and "://" in where else FolderStorage(Path(where))


class FolderStorage:
    """Files in a folder, each written under a temporary name, flushed to the disk and renamed. Nothing in it is a link."""

    def __init__(self, root: Path) -> None:
        self._root = root
        for name in ("files", "artifacts", "packs"):
            (root / name).mkdir(parents=True, exist_ok=True)

    def size(self, name: str) -> int | None:
        path = self._root / name
        return path.stat().st_size if path.is_file() else None

    def read(self, name: str) -> bytes:
        return (self._root / name).read_bytes()

    def blocks(self, name: str, start: int, end: int) -> Iterator[bytes]:
        with (self._root / name).open("rb") as stream:
            stream.seek(start)
            while start < end and (block := stream.read(min(BLOCK, end - start))):
                yield block
                start += len(block)

    def write(self, name: str, size_bytes: int, pieces: Iterable[bytes]) -> None:
        free = shutil.disk_usage(self._root).free
        if free < size_bytes + RESERVE_BYTES:
            raise NoSpace(
                f"the shelf needs {size_bytes} bytes more, {free} are free on its disk", "free some space or use --data"
            )
        durable.replace_file(self._root / name, pieces)

    def names(self, folder: str) -> list[str]:
        return [path.name for path in (self._root / folder).iterdir() if not path.name.startswith(".")]

    def path(self, name: str) -> Path | None:
        path = self._root / name
        return path if path.is_file() else None


class ObjectStorage:
    """A bucket, or a prefix of one. Manifests are kept in memory once read, since they never change."""

    def __init__(self, url: str) -> None:
        try:
            from obstore import exceptions, store
        except ModuleNotFoundError as error:
            raise MissingExtra(f"object storage needs {error.name}", "pip install 'joulemark[storage]'") from error
        retries: Any = {"max_retries": 4, "retry_timeout": timedelta(seconds=RETRY_S)}
        try:
            self._store = store.from_url(url, retry_config=retries)
        except (exceptions.BaseError, ValueError) as error:
            raise BadInput(
                f"{url!r} is no object storage: {_first_line(error)}", "such as s3://bucket/folder"
            ) from error
        self._url = url
        self._small: OrderedDict[str, bytes] = OrderedDict()
        self._lock = threading.Lock()
        self.size("artifacts/none")  # a wrong key or address shows at once

    def size(self, name: str) -> int | None:
        import obstore

        with self._answers():
            try:
                return int(obstore.head(self._store, name)["size"])
            except FileNotFoundError:
                return None

    def read(self, name: str) -> bytes:
        with self._lock:
            known = self._small.get(name)
        if known is not None:
            return known
        body = self._fetch(name)
        if len(body) <= CACHED_BYTES:
            with self._lock:
                self._small[name] = body
                if len(self._small) > CACHED:
                    self._small.popitem(last=False)
        return body

    def blocks(self, name: str, start: int, end: int) -> Iterator[bytes]:
        import obstore

        if start >= end:
            return
        with self._answers():
            for block in obstore.get(self._store, name, options={"range": (start, end)}).stream(min_chunk_size=BLOCK):
                yield bytes(block)

    def write(self, name: str, size_bytes: int, pieces: Iterable[bytes]) -> None:
        import obstore

        with self._answers():  # parts that were uploaded before `pieces` raised are dropped there: obstore aborts
            obstore.put(self._store, name, iter(pieces), use_multipart=True)

    def names(self, folder: str) -> list[str]:
        import obstore

        with self._answers():
            found = [entry["path"] for batch in obstore.list(self._store, folder) for entry in batch]
        return [path.removeprefix(f"{folder}/") for path in found]

    def path(self, name: str) -> Path | None:
        return None

    def _fetch(self, name: str) -> bytes:
        import obstore

        with self._answers():
            answer = obstore.get(self._store, name)
            if answer.meta["size"] > MAX_PACK_BYTES:
                raise BadInput(f"{name} in {self._url} is too large to be what it should be", "delete it there")
            return bytes(answer.bytes())

    @contextmanager
    def _answers(self) -> Generator[None, None, None]:
        from obstore.exceptions import BaseError

        try:
            yield
        except BaseError as error:
            raise Unavailable(
                f"the object storage {self._url} does not answer: {_first_line(error)}",
                "check AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or the provider's own variables",
            ) from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or ["no reason"])[0][:400]
