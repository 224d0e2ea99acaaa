"""What travels on a stick between a host and a board without a network: the same signed orders, files, packs and records as over one.

    bundle.json                       BundleFacts: for which board, from which host
    orders/<number>.json              an envelope with a FetchOrder or a RunOrder; their names sort in the order of their numbers
    files/<sha256>                    what the ordered artifacts need and the board was not known to have
    packs/<pack id>.json              what the ordered runs need
    results/<order number>.json       a record, exactly as the board keeps it …
    results/<order number>.signature  … and the envelope in which the board vouches for it
    enrolment/request.json            EnrolmentRequest: a board that wants to belong to a host
    enrolment/answer.json             EnrolmentAnswer

Nothing on a stick is believed for being there: envelopes are opened with keys that are known, files are named by their digest. Names are
numbers and digests, which every file system can hold. Everything is read with bounds, and links are not followed. Pure but for the files.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import ValidationError

from joulemark import durable
from joulemark.errors import BadInput, NotFound
from joulemark.protocol import EnrolmentAnswer, EnrolmentRequest
from joulemark.statements import MAX_ENVELOPE_BYTES, Envelope, read_envelope, write_envelope
from joulemark.wire import Identifier, Sha256, Title, Wire, canonical_json

FORMAT = 1
FACTS_BYTES = 64 * 1024
MAX_ORDERS = 100_000
BLOCK = 1 << 20
_NUMBER = re.compile(r"([0-9]{12})\.(json|signature)")
_DIGEST = re.compile(r"[0-9a-f]{64}")
Parsed = TypeVar("Parsed", bound=Wire)


class BundleFacts(Wire):
    """The label of a stick. Not signed: it spares the wrong board a search, what counts is signed."""

    format: Literal[1] = FORMAT
    device_id: Identifier
    device: Title
    host_key: Title
    """The id of the key that the orders are signed with, for people."""


@dataclass(frozen=True)
class Result:
    """A record on a stick."""

    number: int
    body: bytes
    signature: Envelope


class Bundle:
    """The folder of one board's bundle. Raises NotFound, BadInput for what is not as it should be, OSError from the stick."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    # --- the host writes, the board reads ---------------------------------------------------------------------------------
    def write_facts(self, facts: BundleFacts) -> None:
        """The label, written last: a bundle with a label is complete."""
        durable.replace_file(self.folder / "bundle.json", [canonical_json(facts)])

    def facts(self) -> BundleFacts:
        """The label."""
        return _parsed(BundleFacts, _read(self.folder / "bundle.json", FACTS_BYTES))

    def write_order(self, number: int, envelope: Envelope) -> None:
        """One signed order."""
        durable.replace_file(self.folder / "orders" / f"{number:012d}.json", [write_envelope(envelope)])

    def orders(self) -> Iterator[tuple[int, Envelope]]:
        """All orders by number."""
        for number, path in _numbered(self.folder / "orders", "json"):
            yield number, read_envelope(_read(path, MAX_ENVELOPE_BYTES))

    def clear_orders(self) -> None:
        """Takes away the label and the orders of an earlier export; files and packs stay, they are named by what they are."""
        (self.folder / "bundle.json").unlink(missing_ok=True)
        for _, path in _numbered(self.folder / "orders", "json"):
            path.unlink()

    def file(self, sha256: Sha256) -> Path:
        """Where a file lies or is to lie."""
        return self.folder / "files" / _digest(sha256)

    def size(self, sha256: Sha256) -> int:
        """How many bytes of a file are here. Raises NotFound."""
        with _opened(self.file(sha256)) as stream:
            return os.fstat(stream.fileno()).st_size

    def blocks(self, sha256: Sha256, start: int) -> Iterator[bytes]:
        """A file's bytes from `start`. Raises NotFound."""
        with _opened(self.file(sha256)) as stream:
            stream.seek(start)
            while block := stream.read(BLOCK):
                yield block

    def pack(self, pack_id: Sha256) -> Path:
        """Where a pack lies or is to lie."""
        return self.folder / "packs" / f"{_digest(pack_id)}.json"

    def read_pack(self, pack_id: Sha256, max_bytes: int) -> bytes:
        """A pack's bytes. Raises NotFound."""
        return _read(self.pack(pack_id), max_bytes)

    # --- the board writes, the host reads ---------------------------------------------------------------------------------
    def write_result(self, result: Result) -> None:
        """A record and its signature; the record last, so that one that is there has its signature."""
        folder = self.folder / "results"
        durable.replace_file(folder / f"{result.number:012d}.signature", [write_envelope(result.signature)])
        durable.replace_file(folder / f"{result.number:012d}.json", [result.body])

    def has_result(self, number: int) -> bool:
        """Whether the record of the run with this order is here."""
        return (self.folder / "results" / f"{number:012d}.json").is_file()

    def results(self) -> list[int]:
        """The numbers of all records that are here."""
        return [number for number, _ in _numbered(self.folder / "results", "json")]

    def result(self, number: int, max_bytes: int) -> Result:
        """One record, not larger than `max_bytes`, with its signature."""
        path = self.folder / "results" / f"{number:012d}.json"
        signature = read_envelope(_read(path.with_suffix(".signature"), MAX_ENVELOPE_BYTES))
        return Result(number, _read(path, max_bytes), signature)

    # --- enrolling --------------------------------------------------------------------------------------------------------
    def write_request(self, request: EnrolmentRequest) -> None:
        """What a board that wants to belong to a host says; it holds the secret of a one-time key."""
        self._write_secret("request", request)

    def request(self) -> EnrolmentRequest:
        """Raises NotFound."""
        return _parsed(EnrolmentRequest, _read(self.folder / "enrolment" / "request.json", MAX_ENVELOPE_BYTES))

    def write_answer(self, answer: EnrolmentAnswer) -> None:
        """The host's answer, which holds the board's credential; the request has done its service."""
        self._write_secret("answer", answer)
        (self.folder / "enrolment" / "request.json").unlink(missing_ok=True)

    def answer(self) -> EnrolmentAnswer | None:
        """The host's answer, if it is here."""
        path = self.folder / "enrolment" / "answer.json"
        return _parsed(EnrolmentAnswer, _read(path, MAX_ENVELOPE_BYTES)) if path.exists() else None

    def clear_enrolment(self) -> None:
        """Takes both away: they hold secrets."""
        for name in ("request", "answer"):
            (self.folder / "enrolment" / f"{name}.json").unlink(missing_ok=True)

    def _write_secret(self, name: str, content: EnrolmentRequest | EnrolmentAnswer) -> None:
        text = content.model_dump_json(by_alias=True).encode()
        durable.replace_file(self.folder / "enrolment" / f"{name}.json", [text], mode=0o600)


def _numbered(folder: Path, kind: str) -> list[tuple[int, Path]]:
    if not folder.is_dir():
        return []
    found = [(match, path) for path in folder.iterdir() if (match := _NUMBER.fullmatch(path.name)) and match[2] == kind]
    if len(found) > MAX_ORDERS:
        raise BadInput(f"{folder} holds {len(found)} files", f"at most {MAX_ORDERS} are read")
    return sorted((int(match[1]), path) for match, path in found)


def _read(path: Path, max_bytes: int) -> bytes:
    with _opened(path) as stream:
        body = stream.read(max_bytes + 1)
    if len(body) > max_bytes:
        raise BadInput(f"{path} has more than {max_bytes} bytes", "it is not what its name says: make the bundle anew")
    return body


def _opened(path: Path):
    """A plain file, open; links are not followed, pipes and devices not read."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        raise NotFound(f"{path} is not there", "make the bundle anew, or look for another stick") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise BadInput(f"{path} is no plain file", "make the bundle anew")
    return os.fdopen(descriptor, "rb")


def _parsed(model: type[Parsed], body: bytes) -> Parsed:
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        raise BadInput(f"this is no {model.__name__}", "was it written by another version of joulemark?") from error


def _digest(name: str) -> str:
    if not _DIGEST.fullmatch(name):
        raise BadInput(f"{name[:80]!r} is no sha256", "ids are 64 hexadecimal digits")
    return name
