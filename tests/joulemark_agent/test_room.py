"""Who gives way in a full store: the least recently used, no more than needed, never what is needed; shared files count once."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from joulemark.wire import FileEntry, Manifest
from joulemark_agent.room import to_evict
from tests.fixtures.records import make_manifest


def of(**sizes: int) -> Manifest:
    """An artifact with files of these names and sizes; equal names are equal files."""
    files = (
        FileEntry(path=f"{name}.gguf", size_bytes=size, sha256=hashlib.sha256(name.encode()).hexdigest())
        for name, size in sizes.items()
    )
    return make_manifest(files=tuple(files))


def test_the_least_recently_used_goes_and_no_more_than_is_needed():
    known = {"old": of(a=100), "middle": of(b=100), "new": of(c=100)}
    for missing, gone in ((1, ["old"]), (100, ["old"]), (101, ["old", "middle"]), (300, ["old", "middle", "new"])):
        assert to_evict(list(known), known, [], missing) == gone
    assert to_evict(list(known), known, [], 301) is None
    assert to_evict([], known, [], 1) is None
    assert to_evict(list(known), known, [], 0) == []


def test_a_shared_base_stays_with_its_last_adapter_and_costs_once():
    known = {"one": of(base=1000, x=10), "two": of(base=1000, y=10), "three": of(z=10)}
    assert to_evict(["one", "two", "three"], known, [], 15) == ["one", "two"]  # 10, then 10 and the base
    assert to_evict(["one", "three"], known, [known["two"]], 20) == ["one", "three"]
    assert to_evict(["one", "three"], known, [known["two"]], 21) is None
    assert to_evict(["one", "three"], known, [known["one"]], 10) == [
        "three"
    ]  # the coming artifact has the very files of `one`


artifacts = st.lists(st.dictionaries(st.sampled_from("abcdef"), st.just(None), min_size=1), min_size=1, max_size=6)


@given(artifacts, artifacts, st.integers(0, 5000))
def test_what_goes_frees_enough_and_its_last_one_was_needed(
    going: Sequence[dict[str, None]], staying: Sequence[dict[str, None]], missing: int
):
    sizes = {letter: 10 ** (number % 4) for number, letter in enumerate("abcdef")}
    known = {str(number): of(**{name: sizes[name] for name in names}) for number, names in enumerate(going)}
    needed = [of(**{name: sizes[name] for name in names}) for names in staying]
    chosen = to_evict(list(known), known, needed, missing)

    def freed(gone: Sequence[str]) -> int:
        kept = [manifest for key, manifest in known.items() if key not in gone] + needed
        there = {entry.sha256: entry.size_bytes for manifest in known.values() for entry in manifest.files}
        return sum(
            size for sha256, size in there.items() if all(sha256 not in {e.sha256 for e in m.files} for m in kept)
        )

    if chosen is None:
        assert freed(list(known)) < missing
    else:
        assert freed(chosen) >= missing
        assert chosen == sorted(chosen, key=int)
        assert not chosen or freed(chosen[:-1]) < missing
