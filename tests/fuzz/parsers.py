"""Every parser of ours that reads what somebody else wrote, as a function of bytes.

Whatever the bytes are, each must return, or raise one of our errors that says what to do next; and it must do so at once. Nothing heavy is
imported: the parsers stand before the engines.
"""

from __future__ import annotations

import base64
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from joulemark import artifact, credentials, discovery, gguf_header, lineage, onnx_header, packs, samples, signing
from joulemark.errors import JoulemarkError
from joulemark.statements import FetchOrder, read_envelope
from joulemark_agent import bandwidth, host_link, machine, profiles, sysfs
from joulemark_agent.backends._onnx_tokenizer import read_json as read_settings
from joulemark_agent.sensors import contention, replay
from joulemark_exporter import configuration, recipe
from joulemark_host import records

SEEDS = Path(__file__).parent / "seeds"
BESIDE = {"model.onnx": 1 << 20, "model.onnx.data": 1000}
KEY = signing.SigningKey(bytes(32))
"""Nobody's: its seed is zeros."""


@dataclass(frozen=True)
class Parser:
    """One of them. `most_bytes`: the longest input that the fuzzer makes up. `json`: whether it may change values instead of bytes."""

    read: Callable[[bytes], object]
    most_bytes: int = 4096
    json: bool = False


def survives(parser: Parser, data: bytes) -> bool:
    """Whether the parser took the bytes; False if it refused them as it should. Any other exception is a defect and is raised."""
    try:
        parser.read(data)
    except JoulemarkError as error:
        assert error.message and error.hint
        return False
    return True


def seeds(name: str) -> list[bytes]:
    """The inputs that are kept for a parser: each once took a path of its own through it, or broke it."""
    return [*_read(SEEDS / f"{name}.txt"), *_read(SEEDS / f"{name}.broke.txt")]


def keep(name: str, inputs: Sequence[bytes]) -> None:
    """Keeps these inputs instead of those so far. What broke the parser stays beside them."""
    _write(SEEDS / f"{name}.txt", inputs)


def keep_broken(name: str, inputs: Sequence[bytes]) -> None:
    """Keeps what broke a parser, for good: it takes no path of its own any more once that is mended."""
    if inputs:
        file = SEEDS / f"{name}.broke.txt"
        _write(file, [*_read(file), *inputs])


def _read(file: Path) -> list[bytes]:
    return [base64.b64decode(line) for line in file.read_text().splitlines()] if file.exists() else []


def _write(file: Path, inputs: Sequence[bytes]) -> None:
    """One in base64 a line, so that a change of them is read like one of code."""
    lines = sorted({base64.b64encode(data).decode() for data in inputs}, key=lambda line: (len(line), line))
    file.write_text("".join(f"{line}\n" for line in lines))


def _file(read: Callable[[Path], object], name: str) -> Callable[[bytes], object]:
    """A parser of files: the bytes are put into one of that name."""
    folder = tempfile.TemporaryDirectory(prefix="joulemark-fuzz-")

    def reader(data: bytes) -> object:
        path = Path(folder.name) / name
        path.write_bytes(data)
        return read(path)

    return reader


def _lines(*readers: Callable[[str], object]) -> Callable[[bytes], object]:
    """Small texts of which each has a reader: a line for each."""

    def reader(data: bytes) -> None:
        for read, part in zip(readers, data.decode("utf-8", "replace").split("\n"), strict=False):
            try:
                read(part)
            except JoulemarkError as error:  # the next ones are to be read all the same
                assert error.message and error.hint

    return reader


def _envelope(data: bytes) -> object:
    return signing.opened(read_envelope(data), FetchOrder, [KEY.public])


def _announcement(data: bytes) -> object:
    names = (b"id", b"name", b"version", b"tls", b"host")
    return discovery.read_entries(dict(zip(names, data.split(b"\0"), strict=False)))


def _counters(data: bytes) -> object:
    text = data.decode("latin-1")
    return (
        contention.parse_stat(data),
        contention.parse_process_ticks(data),
        contention.parse_pressure_us(data),
        sysfs.parse_number("counter", data),
        sysfs.parse_number("counter", text),
    )


PARSERS: Mapping[str, Parser] = {
    "gguf": Parser(_file(gguf_header.read_header, "model.gguf")),
    "onnx": Parser(_file(lambda path: onnx_header.read_onnx(path, BESIDE), "model.onnx")),
    "manifest": Parser(_file(artifact.read_manifest, "manifest.json"), json=True),
    "pack": Parser(packs.parse, json=True),
    "record": Parser(records.parse_record, 8192, json=True),
    "evidence": Parser(lineage.read_evidence, json=True),
    "envelope": Parser(_envelope, json=True),
    "samples": Parser(_file(samples.read_samples, "samples_arc.jsonl"), json=True),
    "profile": Parser(_file(profiles.read_profile, "board.toml"), 2048),
    "recipe": Parser(_file(recipe.read, "recipe.toml"), 2048),
    "configuration": Parser(_file(lambda path: configuration.read(path.parent), "config.json"), 1024, json=True),
    "tokenizer": Parser(_file(read_settings, "tokenizer_config.json"), 1024, json=True),
    "recording_csv": Parser(_file(replay.load, "trace.csv"), 1024),
    "recording_json": Parser(_file(replay.load, "trace.json"), 1024, json=True),
    "announcement": Parser(_announcement, 512),
    "counters": Parser(_counters, 512),
    "words": Parser(
        _lines(
            credentials.parse_credential,
            credentials.parse_enrolment_key,
            bandwidth.parse_size,
            machine.parse_cpu_list,
            host_link.checked_url,
        ),
        512,
    ),
}
