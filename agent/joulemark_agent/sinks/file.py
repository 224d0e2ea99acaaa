"""A folder as a sink: one file `record_<run_id>.json` a record, for boards without a network and for USB sticks.

Where the board signs, its word for the record lies beside it as `record_<run_id>.dsse.json`. A file is whole or not there,
also when the stick is pulled out. The same record again changes nothing; another record under the same name is a Conflict.
The folder is never made: one that is not there may be a stick that is not plugged in. Not aware of queues or of what a
record means.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from joulemark.errors import BadInput, Conflict, JoulemarkError
from joulemark.statements import write_envelope
from joulemark.wire import Identifier
from joulemark_agent.refusals import storage_errors, write_file
from joulemark_agent.sinks import Options, Sink, SinkUnavailable, Vouch


class _FileSink:
    def __init__(self, folder: Path, vouch: Vouch | None) -> None:
        self._folder = folder
        self._vouch = vouch

    def put(self, run_id: str, body: bytes) -> None:
        try:
            name = TypeAdapter(Identifier).validate_python(run_id)
        except ValidationError as error:
            raise BadInput(f"{run_id[:80]!r} is no run id", "a run id has letters, digits, dots and dashes") from error
        path = self._folder / f"record_{name}.json"
        try:
            with storage_errors(f"cannot write the record of run {name} to {self._folder}"):
                if path.exists():
                    self._compare(path, body)
                    return
                if self._vouch is not None:  # first: a record is never there without its signature
                    write_file(path.with_suffix(".dsse.json"), write_envelope(self._vouch(name, body)))
                write_file(path, body)
        except Conflict:
            raise
        except JoulemarkError as error:
            # A full or read-only folder, a stick that is not plugged in: a person can put it right.
            raise SinkUnavailable(error.message, error.hint) from error

    def _compare(self, path: Path, body: bytes) -> None:
        if path.read_bytes() != body:
            raise Conflict(f"{path} holds another record", "a run has one record: look at both")

    def close(self) -> None:
        return


def open_sink(options: Options) -> Sink:
    """A sink for the folder `options.target`, which need not be there yet."""
    if not options.target:
        raise BadInput("no folder was given for the records", "give the path of a folder")
    return _FileSink(Path(options.target), options.vouch)
