"""Every input that a fuzzer once found worth keeping, again: taken or refused, quickly, and never another exception."""

from __future__ import annotations

import time

import pytest

from joulemark.errors import BadInput
from tests.fuzz import beginnings, parsers


@pytest.mark.parametrize("name", parsers.PARSERS)
def test_no_kept_seed_breaks_its_parser(name: str):
    kept = parsers.seeds(name)
    assert kept
    began = time.perf_counter()
    for data in kept:
        parsers.survives(parsers.PARSERS[name], data)
    assert time.perf_counter() - began < 10


@pytest.mark.parametrize("name", parsers.PARSERS)
def test_no_bomb_breaks_a_parser(name: str):
    dotted = b"x" + b".x" * 8000 + b" = 1"  # as long as a recipe may be
    for bomb in (*beginnings.BOMBS, dotted):
        began = time.perf_counter()
        parsers.survives(parsers.PARSERS[name], bomb)
        assert time.perf_counter() - began < 2, bomb[:40]


@pytest.mark.parametrize("name", parsers.PARSERS)
def test_what_the_fuzzer_begins_with_gets_through(name: str):
    """Otherwise it would only ever see the first check."""
    begin = beginnings.beginnings()[name]
    assert any(parsers.survives(parsers.PARSERS[name], data) for data in begin)


def test_a_parser_that_breaks_is_seen():
    def broken(data: bytes) -> int:
        return int(data)

    def refusing(_: bytes) -> None:
        raise BadInput("no", "another")

    assert not parsers.survives(parsers.Parser(refusing), b"x")
    with pytest.raises(ValueError, match="invalid literal"):
        parsers.survives(parsers.Parser(broken), b"x")


def test_seeds_are_read_as_they_were_kept(tmp_path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(parsers, "SEEDS", tmp_path)
    parsers.keep("words", [b"b\n\xff", b"a", b"a", b""])
    assert parsers.seeds("words") == [b"", b"a", b"b\n\xff"]
    parsers.keep_broken("words", [b"c"])
    parsers.keep_broken("words", [])
    parsers.keep_broken("words", [b"d"])
    parsers.keep("words", [b"e"])
    assert parsers.seeds("words") == [b"e", b"c", b"d"]
