"""Sticks for boards without a network: what a board is to do, written down whole; what it brought back, taken in.

The orders are those of the board's queue, signed as always; its runs are lent to the stick for as long as an order lives. Not aware of the
terminal. Sizes are bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from joulemark import durable, signing
from joulemark.bundles import Bundle, BundleFacts
from joulemark.errors import JoulemarkError, NotFound
from joulemark.protocol import DeviceRow
from joulemark.statements import FetchOrder, RunOrder, read_envelope
from joulemark.wire import FileEntry
from joulemark_host.dispatch import Dispatch
from joulemark_host.identity import HostIdentity
from joulemark_host.receiving import receive
from joulemark_host.records import Records
from joulemark_host.registry import Registry
from joulemark_host.shelf import Shelf

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Exported:
    """What was written."""

    artifacts: int
    runs: int
    size_bytes: int


@dataclass(frozen=True)
class Imported:
    """What became of one record of a stick. `problem` is None when it is stored now, or was already."""

    number: int
    created: bool
    problem: JoulemarkError | None


def export(
    folder: Path,
    device: DeviceRow,
    identity: HostIdentity,
    dispatch: Dispatch,
    shelf: Shelf,
    with_models: bool = False,
    progress: Progress = lambda _done, _total: None,
) -> Exported:
    """Writes what a board has to do and to get into `folder`. `with_models`: also models that it is known to have.

    Raises NotFound when there is nothing, OSError from the stick.
    """
    bundle = Bundle(folder)
    fetches, runs = dispatch.lend(device.device_id, with_models)
    if not fetches and not runs:
        raise NotFound(
            f"the board {device.name!r} has nothing to do", "`joulemark run` or `sweep --no-wait` queues runs"
        )
    orders = {opened.sequence: envelope for envelope in fetches for opened in [_fetch(envelope)]}
    files = {entry.sha256: entry for envelope in fetches for entry in _fetch(envelope).manifest.files}
    specs = {_run(envelope).sequence: (_run(envelope).spec, envelope) for envelope in runs}
    for directory in ("orders", "files", "packs", "results"):
        (folder / directory).mkdir(parents=True, exist_ok=True)
    bundle.clear_orders()
    total = sum(entry.size_bytes for entry in files.values())
    done = 0
    for entry in files.values():
        _copy(bundle, shelf, entry, lambda copied, before=done: progress(before + copied, total))
        done += entry.size_bytes
        progress(done, total)
    for spec, _ in specs.values():
        pack = shelf.pack_bytes(spec.pack_id)
        durable.replace_file(bundle.pack(spec.pack_id), [pack])
    for number, envelope in sorted({**orders, **{number: envelope for number, (_, envelope) in specs.items()}}.items()):
        bundle.write_order(number, read_envelope(envelope))
    key = signing.key_id(identity.key.public)
    bundle.write_facts(BundleFacts(device_id=device.device_id, device=device.name, host_key=key))
    return Exported(len(fetches), len(runs), total)


def import_results(folder: Path, records: Records, registry: Registry, dispatch: Dispatch) -> Iterator[Imported]:
    """Takes every record of a stick in; one that is damaged or refused does not stop the others."""
    bundle = Bundle(folder)
    for number in bundle.results():
        try:
            result = bundle.result(number, records.max_record_bytes)
            created = receive(result.body, result.signature, records, registry, dispatch)
        except JoulemarkError as error:
            yield Imported(number, False, error)
        else:
            yield Imported(number, created, None)


def _copy(bundle: Bundle, shelf: Shelf, entry: FileEntry, progress: Callable[[int], None]) -> None:
    target = bundle.file(entry.sha256)
    if target.is_file() and target.stat().st_size == entry.size_bytes:
        return  # of an earlier export; the board checks the digest in any case

    def pieces() -> Iterator[bytes]:
        done = 0
        for block in shelf.file(entry.sha256).blocks():
            yield block
            done += len(block)
            progress(done)

    durable.replace_file(target, pieces())


def _fetch(envelope: str) -> FetchOrder:
    return FetchOrder.model_validate_json(read_envelope(envelope).body())


def _run(envelope: str) -> RunOrder:
    return RunOrder.model_validate_json(read_envelope(envelope).body())
