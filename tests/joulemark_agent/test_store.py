"""The store under cuts, kills, full disks, flipped bytes and bad names."""

from __future__ import annotations

import errno
import hashlib
import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from joulemark import packs
from joulemark.errors import (
    BadInput,
    Conflict,
    DigestMismatch,
    JoulemarkError,
    NoSpace,
    NotFound,
    PackRejected,
    Unavailable,
)
from joulemark.wire import FileEntry, Manifest, canonical_json, content_id
from joulemark_agent import incoming, refusals
from joulemark_agent.store import ABANDONED_S, Store
from tests.fixtures.records import make_manifest, make_pack

CONTENT = bytes(range(256)) * 5 + b"the end"
OTHER = b"another file"


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def entry(content: bytes, name: str = "model.gguf", size: int | None = None) -> FileEntry:
    return FileEntry(path=name, size_bytes=size or len(content), sha256=sha256(content))


def manifest_of(*contents: bytes, name: str = "model") -> Manifest:
    files = tuple(entry(content, f"{name}-{index}.gguf") for index, content in enumerate(contents))
    return make_manifest(name=name, files=files)


def plenty(_: Path) -> int:
    return 1 << 50


def open_store(root: Path) -> Store:
    return Store(root, free=plenty)


def push(store: Store, manifest: Manifest, *contents: bytes) -> str:
    artifact_id, missing = store.announce(manifest)
    for content in contents:
        if sha256(content) in missing:
            store.append(sha256(content), 0, content)
            store.finish(sha256(content))
    return artifact_id


def tree(root: Path) -> dict[str, bytes]:
    """Every file below `root` that is not a folder, with its content."""
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


# --- arriving ---------------------------------------------------------------------------------------------------------
def test_an_artifact_arrives_whole(tmp_path: Path) -> None:
    store, manifest = open_store(tmp_path), manifest_of(CONTENT, OTHER)
    artifact_id, missing = store.announce(manifest)
    assert artifact_id == content_id(manifest)
    assert missing == (sha256(CONTENT), sha256(OTHER))
    assert store.artifacts() == {}
    with pytest.raises(NotFound, match="not complete yet"):
        store.manifest(artifact_id)

    assert store.append(sha256(CONTENT), 0, CONTENT) == len(CONTENT)
    store.finish(sha256(CONTENT))
    assert store.artifacts() == {}
    assert [file.complete for file in store.progress(artifact_id).files] == [True, False]

    store.append(sha256(OTHER), 0, OTHER)
    store.finish(sha256(OTHER))
    assert store.artifacts() == {artifact_id: manifest}
    assert store.manifest(artifact_id) == manifest
    assert store.progress(artifact_id).complete
    assert store.file_path(sha256(CONTENT)).read_bytes() == CONTENT
    assert store.verify_file(sha256(CONTENT)) == store.file_path(sha256(CONTENT))
    assert not list(tmp_path.rglob("*.part"))


def test_the_layout_on_disk(tmp_path: Path) -> None:
    manifest = manifest_of(CONTENT)
    artifact_id = push(open_store(tmp_path), manifest, CONTENT)
    digest = sha256(CONTENT)
    assert tree(tmp_path) == {
        f"files/{digest[:2]}/{digest}": CONTENT,
        f"artifacts/{artifact_id}.json": canonical_json(manifest),
    }
    assert (tmp_path / "files" / digest[:2] / digest).stat().st_mode & 0o222 == 0


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cuts=st.lists(st.integers(0, len(CONTENT)), max_size=4), restart=st.booleans())
def test_cut_anywhere_and_resumed_gives_the_same_file(
    tmp_path_factory: pytest.TempPathFactory, cuts: list[int], restart: bool
) -> None:
    root = tmp_path_factory.mktemp("store")
    store, manifest = open_store(root), manifest_of(CONTENT)
    artifact_id, _ = store.announce(manifest)
    for end in [*sorted(cuts), len(CONTENT)]:
        start = store.offset(sha256(CONTENT))
        assert store.append(sha256(CONTENT), start, CONTENT[start:end]) == end
        if restart:
            store = open_store(root)
            assert store.offset(sha256(CONTENT)) == end
            assert store.progress(artifact_id).files[0].received_bytes == end
    store.finish(sha256(CONTENT))
    assert store.file_path(sha256(CONTENT)).read_bytes() == CONTENT
    assert list(store.artifacts()) == [artifact_id]


def test_finish_if_complete(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    store.announce(manifest_of(CONTENT))
    store.append(sha256(CONTENT), 0, CONTENT[:10])
    assert store.finish_if_complete(sha256(CONTENT)) is False
    with pytest.raises(Conflict, match=f"10 of {len(CONTENT)} bytes"):
        store.finish(sha256(CONTENT))
    store.append(sha256(CONTENT), 10, CONTENT[10:])
    assert store.finish_if_complete(sha256(CONTENT)) is True
    store.finish(sha256(CONTENT))  # harmless twice


@pytest.mark.parametrize("offset", [0, 9, 11, 5000])
def test_a_wrong_offset_changes_nothing(tmp_path: Path, offset: int) -> None:
    store = open_store(tmp_path)
    store.announce(manifest_of(CONTENT))
    store.append(sha256(CONTENT), 0, CONTENT[:10])
    part = next(tmp_path.rglob("*.part"))
    before = part.stat()
    with pytest.raises(Conflict, match="has 10 bytes here"):
        store.append(sha256(CONTENT), offset, b"xxxx")
    after = part.stat()
    assert (after.st_ino, after.st_mtime_ns, after.st_size) == (before.st_ino, before.st_mtime_ns, 10)
    assert store.append(sha256(CONTENT), 10, CONTENT[10:]) == len(CONTENT)
    store.finish(sha256(CONTENT))


def test_more_than_was_announced_is_refused(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    store.announce(manifest_of(CONTENT))
    store.append(sha256(CONTENT), 0, CONTENT[:-1])
    with pytest.raises(BadInput, match="was announced with"):
        store.append(sha256(CONTENT), len(CONTENT) - 1, b"ab")
    assert store.offset(sha256(CONTENT)) == len(CONTENT) - 1
    store.append(sha256(CONTENT), len(CONTENT) - 1, CONTENT[-1:])
    store.finish(sha256(CONTENT))
    with pytest.raises(Conflict, match="complete here"):
        store.append(sha256(CONTENT), len(CONTENT), b"a")


@pytest.mark.parametrize("position", [0, 700, len(CONTENT) - 1])
def test_a_flipped_byte_is_found_put_aside_and_can_be_sent_again(tmp_path: Path, position: int) -> None:
    store, manifest = open_store(tmp_path), manifest_of(CONTENT)
    artifact_id, _ = store.announce(manifest)
    flipped = CONTENT[:position] + bytes([CONTENT[position] ^ 1]) + CONTENT[position + 1 :]
    store.append(sha256(CONTENT), 0, flipped)
    with pytest.raises(DigestMismatch, match="arrived damaged") as caught:
        store.finish(sha256(CONTENT))
    assert caught.value.retryable
    assert (tmp_path / "quarantine" / sha256(CONTENT)).read_bytes() == flipped
    assert store.artifacts() == {}
    assert store.offset(sha256(CONTENT)) == 0
    assert push(store, manifest, CONTENT) == artifact_id
    assert list(store.artifacts()) == [artifact_id]


def test_a_byte_that_flipped_on_disk_between_two_pieces_is_found(tmp_path: Path) -> None:
    open_store(tmp_path).announce(manifest_of(CONTENT))
    open_store(tmp_path).append(sha256(CONTENT), 0, CONTENT[:500])
    part = next(tmp_path.rglob("*.part"))
    part.write_bytes(b"?" + CONTENT[1:500])
    store = open_store(tmp_path)  # after a restart
    store.append(sha256(CONTENT), 500, CONTENT[500:])
    with pytest.raises(DigestMismatch):
        store.finish(sha256(CONTENT))


def test_of_two_senders_at_the_same_offset_one_wins(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    store.announce(manifest_of(CONTENT))
    barrier, outcomes = threading.Barrier(4), list[object]()

    def send() -> None:
        barrier.wait()
        try:
            outcomes.append(store.append(sha256(CONTENT), 0, CONTENT))
        except Conflict as error:
            outcomes.append(error.code)

    threads = [threading.Thread(target=send) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(map(str, outcomes)) == [str(len(CONTENT)), "conflict", "conflict", "conflict"]
    store.finish(sha256(CONTENT))


def test_two_finish_at_once(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    store.announce(manifest_of(CONTENT))
    store.append(sha256(CONTENT), 0, CONTENT)
    barrier, errors = threading.Barrier(4), list[Exception]()

    def finish() -> None:
        barrier.wait()
        try:
            store.finish(sha256(CONTENT))
        except JoulemarkError as error:
            errors.append(error)

    threads = [threading.Thread(target=finish) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert len(store.artifacts()) == 1


# --- kills ------------------------------------------------------------------------------------------------------------
def test_killed_between_the_last_file_and_the_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, manifest = open_store(tmp_path), manifest_of(CONTENT)
    artifact_id, _ = store.announce(manifest)
    store.append(sha256(CONTENT), 0, CONTENT)

    def killed(_: Store) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Store, "_promote", killed)
    with pytest.raises(KeyboardInterrupt):
        store.finish(sha256(CONTENT))
    assert not list((tmp_path / "artifacts").iterdir())
    monkeypatch.undo()
    assert list(open_store(tmp_path).artifacts()) == [artifact_id]
    assert not list((tmp_path / "incoming").iterdir())


def test_kill_minus_nine_while_a_file_arrives(tmp_path: Path) -> None:
    child = textwrap.dedent(
        """
        import sys
        from pathlib import Path
        from joulemark_agent.store import Store
        from tests.joulemark_agent.test_store import CONTENT, manifest_of, plenty, sha256
        store = Store(Path(sys.argv[1]), free=plenty)
        store.announce(manifest_of(CONTENT))
        for position in range(0, len(CONTENT), 100):
            store.append(sha256(CONTENT), position, CONTENT[position:position + 100])
            print(store.offset(sha256(CONTENT)), flush=True)
        import time
        time.sleep(60)
        """
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in (str(Path.cwd()), *sys.path) if path)}
    with subprocess.Popen(
        [sys.executable, "-c", child, str(tmp_path)], stdout=subprocess.PIPE, env=environment, text=True
    ) as process:
        assert process.stdout is not None
        acknowledged = [int(process.stdout.readline()) for _ in range(4)][-1]
        process.kill()
    store = open_store(tmp_path)
    here = store.offset(sha256(CONTENT))
    assert here >= acknowledged == 400
    store.append(sha256(CONTENT), here, CONTENT[here:])
    store.finish(sha256(CONTENT))
    assert store.file_path(sha256(CONTENT)).read_bytes() == CONTENT


def test_the_order_on_disk_is_file_then_folder_then_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, manifest = open_store(tmp_path), manifest_of(CONTENT)
    artifact_id, _ = store.announce(manifest)
    store.append(sha256(CONTENT), 0, CONTENT)
    steps: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def note_fsync(descriptor: int) -> None:
        steps.append("fsync " + Path(f"/proc/self/fd/{descriptor}").readlink().name)
        fsync(descriptor)

    def note_replace(source: Path, target: Path) -> Path:
        steps.append(f"rename {source.name} → {target.parent.name}")
        return replace(source, target)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(Path, "replace", note_replace)
    store.finish(sha256(CONTENT))
    digest = sha256(CONTENT)
    assert steps == [
        f"fsync {digest}.part",
        f"rename {digest}.part → {digest[:2]}",
        f"fsync {digest[:2]}",
        f"rename {artifact_id}.json → artifacts",
        "fsync artifacts",
        "fsync incoming",
    ]


def test_parts_that_nobody_wants_are_removed_at_the_start(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    artifact_id, _ = store.announce(manifest_of(CONTENT))
    store.append(sha256(CONTENT), 0, b"x")
    (tmp_path / "incoming" / f"{artifact_id}.json").unlink()
    open_store(tmp_path)
    assert not list(tmp_path.rglob("*.part"))


# --- space and permissions --------------------------------------------------------------------------------------------
def test_space_is_checked_before_anything_is_sent(tmp_path: Path) -> None:
    size = len(CONTENT)
    free = {"bytes": size + 99}
    store = Store(tmp_path, reserve_bytes=100, free=lambda _: free["bytes"])
    with pytest.raises(NoSpace, match="kept in reserve") as caught:
        store.announce(manifest_of(CONTENT))
    assert caught.value.hint
    assert tree(tmp_path) == {}
    free["bytes"] += 1
    store.announce(manifest_of(CONTENT))
    store.append(sha256(CONTENT), 0, CONTENT[:50])
    # 50 bytes are here, so 50 fewer are to come; the second artifact must fit beside the rest of the first.
    free["bytes"] = 100 + (size - 50) + len(OTHER) - 1
    with pytest.raises(NoSpace):
        store.announce(manifest_of(OTHER))
    free["bytes"] += 1
    store.announce(manifest_of(OTHER))


class Quota:
    """A store for two small artifacts, with what it needs and what it gave up."""

    def __init__(self, root: Path, limit: int = 250) -> None:
        self.needed: set[str] = set()
        self.evicted: list[str] = []
        self.root = root
        self.limit = limit
        self.open()

    def open(self) -> None:
        self.store = Store(
            self.root,
            free=plenty,
            limit_bytes=self.limit,
            needed=self.needed.__contains__,
            on_evicted=self.evicted.append,
        )

    def push(self, letter: str, size: int = 100) -> str:
        content = letter.encode() * size
        return push(self.store, manifest_of(content, name=letter), content)


def test_the_least_recently_used_artifact_gives_way_and_the_host_hears_of_it(tmp_path: Path) -> None:
    quota = Quota(tmp_path)
    a, b = quota.push("a"), quota.push("b")
    assert set(quota.store.artifacts()) == {a, b} and quota.evicted == []
    quota.store.model_path(a)  # a run, or a completion
    c = quota.push("c")
    assert set(quota.store.artifacts()) == {a, c} and quota.evicted == [b]
    assert not quota.store._file(sha256(b"b" * 100)).exists()
    os.utime(tmp_path / "artifacts" / f"{c}.json", (2, 2))  # whatever the clock said: the order of use is what counts
    quota.open()
    quota.store.model_path(a)
    quota.open()  # also after a restart
    d = quota.push("d")
    assert set(quota.store.artifacts()) == {a, d} and quota.evicted == [b, c]


def test_what_a_queued_run_needs_never_gives_way(tmp_path: Path) -> None:
    quota = Quota(tmp_path)
    a, b = quota.push("a"), quota.push("b")
    quota.needed |= {a}
    c = quota.push("c")
    assert set(quota.store.artifacts()) == {a, c} and quota.evicted == [b]
    quota.needed |= {c}
    before = tree(tmp_path)
    with pytest.raises(NoSpace, match="are missing") as raised:
        quota.push("d")
    assert "store-limit" in raised.value.hint
    assert tree(tmp_path) == before and quota.evicted == [b]  # nothing was removed for nothing
    with pytest.raises(NoSpace):
        quota.push("huge", 251)
    assert set(quota.store.artifacts()) == {a, c}


def test_what_is_arriving_counts_and_is_not_taken_away(tmp_path: Path) -> None:
    quota = Quota(tmp_path)
    a = quota.push("a")
    arriving = manifest_of(b"z" * 100, name="z")
    quota.store.announce(arriving)
    quota.store.append(sha256(b"z" * 100), 0, b"z" * 40)
    b = quota.push("b")
    assert set(quota.store.artifacts()) == {b} and quota.evicted == [a]
    assert quota.store.offset(sha256(b"z" * 100)) == 40


def test_an_upload_that_nobody_continues_yields_after_an_hour_and_one_that_is_fetched_does_not(tmp_path: Path) -> None:
    now, ordered = [0.0], set[str]()
    store = Store(tmp_path, free=plenty, limit_bytes=250, clock=lambda: now[0], ordered=ordered.__contains__)
    left, fetched = manifest_of(b"l" * 100, name="left"), manifest_of(b"f" * 100, name="fetched")
    for manifest, content in ((left, b"l" * 40), (fetched, b"f" * 40)):
        store.announce(manifest)
        store.append(manifest.files[0].sha256, 0, content)
    ordered.add(content_id(fetched))
    coming = manifest_of(b"c" * 100, name="coming")
    now[0] = ABANDONED_S - 1
    with pytest.raises(NoSpace):
        store.announce(coming)
    store.append(left.files[0].sha256, 40, b"l")  # somebody goes on
    now[0] += ABANDONED_S - 1
    with pytest.raises(NoSpace):
        store.announce(coming)
    now[0] += 1
    store.announce(coming)
    with pytest.raises(NotFound):
        store.progress(content_id(left))
    assert store.offset(fetched.files[0].sha256) == 40
    assert not list((tmp_path / "files").rglob(f"{left.files[0].sha256}*"))
    again = Store(tmp_path, free=plenty, limit_bytes=250, clock=lambda: now[0], ordered=ordered.__contains__)
    with pytest.raises(NoSpace):  # a new start begins to count anew
        again.announce(left)


def test_a_full_disk_makes_room_too(tmp_path: Path) -> None:
    evicted: list[str] = []
    size = len(CONTENT)

    def free(root: Path) -> int:
        return 2 * size + 50 - sum(path.stat().st_size for path in (root / "files").rglob("*") if path.is_file())

    store = Store(tmp_path, reserve_bytes=0, free=free, needed=lambda _: False, on_evicted=evicted.append)
    first = push(store, manifest_of(CONTENT, name="first"), CONTENT)
    other = CONTENT[::-1]
    push(store, manifest_of(other, name="second"), other)
    assert evicted == []
    third = bytes(size)
    push(store, manifest_of(third, name="third"), third)
    assert evicted == [first]


def test_the_quarantine_yields_when_space_is_needed(tmp_path: Path) -> None:
    rotten = tmp_path / "quarantine" / sha256(OTHER)
    store = Store(tmp_path, reserve_bytes=0, free=lambda _: 10 if rotten.exists() else 10_000)
    rotten.write_bytes(b"rotten")
    store.announce(manifest_of(CONTENT))
    assert not rotten.exists()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_fills_up_leaves_the_offset_true(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    store = open_store(tmp_path)
    store.announce(manifest_of(CONTENT))
    store.append(sha256(CONTENT), 0, CONTENT[:100])
    original = Path.open

    def torn_open(path: Path, *arguments: object, **named: object) -> object:
        file = original(path, *arguments, **named)  # type: ignore[arg-type, call-overload]
        if arguments == ("ab",):
            return Torn(file)
        return file

    class Torn:
        """Takes 7 bytes, then the disk is full."""

        def __init__(self, file: object) -> None:
            self.file, self.calls = file, 0

        def __enter__(self) -> Torn:
            return self

        def __exit__(self, *_: object) -> None:
            self.file.close()  # type: ignore[attr-defined]

        def fileno(self) -> int:
            return self.file.fileno()  # type: ignore[attr-defined]

        def write(self, data: memoryview) -> int:
            self.calls += 1
            if self.calls > 1:
                raise OSError(number, os.strerror(number))
            return self.file.write(data[:7])  # type: ignore[attr-defined]

    monkeypatch.setattr(incoming.Path, "open", torn_open)
    with pytest.raises(NoSpace, match="no space left"):
        store.append(sha256(CONTENT), 100, CONTENT[100:])
    monkeypatch.undo()
    assert store.offset(sha256(CONTENT)) == 100
    store.append(sha256(CONTENT), 100, CONTENT[100:])
    store.finish(sha256(CONTENT))
    assert store.file_path(sha256(CONTENT)).read_bytes() == CONTENT


def test_a_real_write_limit(tmp_path: Path) -> None:
    """RLIMIT_FSIZE in a child: the kernel itself refuses in the middle of a piece."""
    child = textwrap.dedent(
        """
        import resource, signal, sys
        from pathlib import Path
        from joulemark.errors import NoSpace
        from joulemark_agent.store import Store
        from tests.joulemark_agent.test_store import manifest_of, plenty, sha256
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        content = bytes(100_000)
        store = Store(Path(sys.argv[1]), free=plenty)
        store.announce(manifest_of(content))
        store.append(sha256(content), 0, content[:60_000])
        resource.setrlimit(resource.RLIMIT_FSIZE, (70_000, 70_000))
        try:
            store.append(sha256(content), 60_000, content[60_000:])
        except NoSpace as error:
            print("refused", store.offset(sha256(content)), error.code)
        """
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in (str(Path.cwd()), *sys.path) if path)}
    done = subprocess.run(
        [sys.executable, "-c", child, str(tmp_path)], capture_output=True, env=environment, text=True, check=False
    )
    assert done.stdout == "refused 60000 no_space\n", done.stderr


def test_an_error_of_the_disk_while_finishing_is_no_artifact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(tmp_path)
    store.announce(manifest_of(CONTENT))
    store.append(sha256(CONTENT), 0, CONTENT)

    def broken(_: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(JoulemarkError, match="Input/output error") as caught:
        store.finish(sha256(CONTENT))
    assert caught.value.code == "storage_failed"
    monkeypatch.undo()
    assert store.artifacts() == {}
    assert open_store(tmp_path).artifacts() == {}


def test_a_file_system_that_became_read_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, manifest = open_store(tmp_path), manifest_of(CONTENT)
    artifact_id = push(store, manifest, CONTENT)

    def refused(*_: object, **__: object) -> int:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "open", refused)
    with pytest.raises(JoulemarkError, match="Read-only file system") as caught:
        store.announce(manifest_of(OTHER))
    assert caught.value.code == "not_permitted"
    assert "read-only" in caught.value.hint
    assert list(store.artifacts()) == [artifact_id]


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_folder_without_permission(tmp_path: Path) -> None:
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    with pytest.raises(JoulemarkError, match="cannot open the store") as caught:
        open_store(locked / "store")
    assert caught.value.code == "not_permitted"


def test_a_file_where_the_store_should_be(tmp_path: Path) -> None:
    (tmp_path / "store").write_text("no folder")
    with pytest.raises(JoulemarkError, match="cannot open the store"):
        open_store(tmp_path / "store")


# --- bit rot, sharing, deleting ---------------------------------------------------------------------------------------
def test_bit_rot_is_found_before_a_load_and_a_push_repairs_it(tmp_path: Path) -> None:
    store, manifest = open_store(tmp_path), manifest_of(CONTENT, OTHER)
    artifact_id = push(store, manifest, CONTENT, OTHER)
    path = store.file_path(sha256(CONTENT))
    path.chmod(0o644)
    path.write_bytes(b"!" + CONTENT[1:])
    with pytest.raises(DigestMismatch, match="is damaged"):
        store.verify_file(sha256(CONTENT))
    assert store.artifacts() == {}
    with pytest.raises(NotFound):
        store.file_path(sha256(CONTENT))
    assert open_store(tmp_path).artifacts() == {}
    assert store.announce(manifest)[1] == (sha256(CONTENT),)
    push(store, manifest, CONTENT)
    assert list(store.artifacts()) == [artifact_id]
    store.verify_file(sha256(CONTENT))


def test_files_that_artifacts_share_are_kept_once_and_as_long_as_needed(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    first, second = manifest_of(CONTENT, OTHER, name="first"), manifest_of(CONTENT, name="second")
    first_id = push(store, first, CONTENT, OTHER)
    second_id, missing = store.announce(second)
    assert missing == ()
    assert set(store.artifacts()) == {first_id, second_id}
    store.delete(first_id)
    assert store.file_path(sha256(CONTENT)).read_bytes() == CONTENT
    with pytest.raises(NotFound):
        store.file_path(sha256(OTHER))
    store.delete(second_id)
    assert tree(tmp_path) == {}
    with pytest.raises(NotFound, match="push it first"):
        store.delete(second_id)


def test_deleting_what_is_still_arriving(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    artifact_id, _ = store.announce(manifest_of(CONTENT))
    store.append(sha256(CONTENT), 0, CONTENT[:10])
    store.delete(artifact_id)
    assert tree(tmp_path) == {}
    with pytest.raises(NotFound, match="announce the artifact first"):
        store.append(sha256(CONTENT), 10, CONTENT[10:])


def test_two_sizes_for_one_file(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    store.announce(manifest_of(CONTENT))
    lying = make_manifest(name="liar", files=(entry(CONTENT, size=5),))
    with pytest.raises(BadInput, match="and elsewhere with"):
        store.announce(lying)


@pytest.mark.parametrize("damage", [b"{", b"", b'{"schema_number": 1}', b"\xff\xfe"])
def test_a_damaged_manifest_is_left_out_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: bytes
) -> None:
    good = push(open_store(tmp_path), manifest_of(OTHER, name="good"), OTHER)
    bad = push(open_store(tmp_path), manifest_of(CONTENT, name="bad"), CONTENT)
    (tmp_path / "artifacts" / f"{bad}.json").write_bytes(damage)
    assert list(open_store(tmp_path).artifacts()) == [good]
    assert bad in caplog.text


def test_a_manifest_under_another_name_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    artifact_id = push(open_store(tmp_path), manifest_of(CONTENT), CONTENT)
    path = tmp_path / "artifacts" / f"{artifact_id}.json"
    path.rename(path.with_name(f"{'0' * 64}.json"))
    assert open_store(tmp_path).artifacts() == {}
    assert "not the manifest that its name says" in caplog.text


@pytest.mark.parametrize(
    "bad", ["", "..", "../../etc/passwd", "a" * 63, "A" * 64, "g" * 64, "a" * 64 + "\n", "/" + "a" * 63, "a" * 5000]
)
def test_bad_ids_never_become_paths(tmp_path: Path, bad: str) -> None:
    store = open_store(tmp_path / "store")
    before = tree(tmp_path)
    calls = (
        store.manifest,
        store.manifest_of,
        store.progress,
        store.delete,
        store.offset,
        store.expected_size,
        store.finish,
        store.file_path,
        store.verify_file,
        store.pack_path,
        store.delete_pack,
        lambda text: store.append(text, 0, b"x"),
        lambda text: store.put_pack(text, b"x"),
    )
    for call in calls:
        with pytest.raises(BadInput, match="is no id"):
            call(bad)
    assert tree(tmp_path) == before


def test_a_link_in_the_store_is_not_followed(tmp_path: Path) -> None:
    store = open_store(tmp_path / "store")
    secret = tmp_path / "secret"
    secret.write_bytes(CONTENT)
    folder = tmp_path / "store" / "files" / sha256(CONTENT)[:2]
    folder.mkdir()
    (folder / sha256(CONTENT)).symlink_to(secret)
    with pytest.raises(NotFound):
        store.file_path(sha256(CONTENT))


# --- pulling ----------------------------------------------------------------------------------------------------------
def test_pull_gets_what_is_missing_from_where_it_stopped(tmp_path: Path) -> None:
    store, manifest = open_store(tmp_path), manifest_of(CONTENT, OTHER)
    asked: list[tuple[str, int]] = []

    def fetch(digest: str, offset: int) -> Iterator[bytes]:
        asked.append((digest, offset))
        content = {sha256(CONTENT): CONTENT, sha256(OTHER): OTHER}[digest]
        yield content[offset : offset + 300]
        if len(asked) == 1:
            raise Unavailable("the host went away", "try again later")
        yield content[offset + 300 :]

    artifact_id, _ = store.announce(manifest)
    with pytest.raises(Unavailable, match="went away"):
        store.pull(artifact_id, fetch)
    store.pull(artifact_id, fetch)
    assert asked == [(sha256(CONTENT), 0), (sha256(CONTENT), 300), (sha256(OTHER), 0)]
    assert list(store.artifacts()) == [artifact_id]
    store.pull(artifact_id, fetch)
    assert len(asked) == 3


def test_pull_that_ends_early_or_brings_too_much(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    with pytest.raises(NotFound):
        store.pull("0" * 64, lambda _, __: iter([b"x"]))
    artifact_id, _ = store.announce(manifest_of(CONTENT))
    with pytest.raises(Unavailable, match=f"ended after 10 of {len(CONTENT)} bytes"):
        store.pull(artifact_id, lambda _, offset: iter([CONTENT[offset : offset + 10]]))
    with pytest.raises(BadInput, match="was announced with"):
        store.pull(artifact_id, lambda _, offset: iter([CONTENT[offset:], b"more"]))
    # All bytes were here already: nothing is fetched, the file is only finished.
    store.pull(artifact_id, lambda _, __: pytest.fail("nothing is to be fetched"))
    assert len(store.artifacts()) == 1


# --- packs ------------------------------------------------------------------------------------------------------------
def real_pack() -> tuple[str, bytes]:
    pack = make_pack()
    pack = pack.model_copy(update={"task_hash": packs.task_hash(pack.items, 2), "task": "an_unknown_task"})
    data = canonical_json(pack)
    return sha256(data), data


def test_packs(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    pack_id, data = real_pack()
    with pytest.raises(NotFound, match="push the pack first"):
        store.pack_path(pack_id)
    store.put_pack(pack_id, data)
    store.put_pack(pack_id, data)
    assert store.packs() == (pack_id,)
    assert store.pack_path(pack_id).read_bytes() == data
    assert packs.read(store.pack_path(pack_id), pack_id).task == "an_unknown_task"
    store.delete_pack(pack_id)
    assert store.packs() == ()


def test_a_wrong_pack_is_not_kept(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    pack_id, data = real_pack()
    for wrong in (data[:-1], b"", data.replace(b"Question", b"Questiom", 1)):
        with pytest.raises(PackRejected):
            store.put_pack(pack_id, wrong)
    assert tree(tmp_path) == {}


# --- durable files ----------------------------------------------------------------------------------------------------
def test_a_failed_write_leaves_the_old_file_and_no_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    refusals.write_file(path, b"old")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(NoSpace, match="cannot write"):
        refusals.write_file(path, b"new")
    monkeypatch.undo()
    assert tree(tmp_path) == {"file": b"old"}
    refusals.write_file(path, b"new")
    assert tree(tmp_path) == {"file": b"new"}
