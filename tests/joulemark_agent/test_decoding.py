"""Stop strings across token borders and UTF-8 across tokens."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from joulemark_agent.decoding import TextBuffer, first_stop


def test_a_stop_string_may_span_tokens() -> None:
    buffer = TextBuffer(("Question:",))
    assert [buffer.push(piece) for piece in (b" 18.\n\nQue", b"sti", b"on", b": next")] == [False, False, False, True]
    assert buffer.finish() == " 18.\n\n"


def test_the_earliest_stop_wins_whatever_the_order() -> None:
    buffer = TextBuffer(("</s>", "Q:"))
    assert buffer.push(b"a Q: b </s>")
    assert buffer.text == "a "


def test_a_character_may_span_tokens() -> None:
    buffer = TextBuffer()
    euro = "€".encode()
    for byte in euro[:2]:
        assert not buffer.push(bytes([byte]))
        assert buffer.text == ""
    buffer.push(euro[2:])
    assert buffer.finish() == "€"


def test_an_unfinished_character_is_marked() -> None:
    buffer = TextBuffer()
    buffer.push(b"ok \xe2\x82")
    assert buffer.finish() == "ok �"


def test_output_is_not_stripped() -> None:
    buffer = TextBuffer(("Q:",))
    buffer.push(b"  x \n")
    assert buffer.finish() == "  x \n"


def test_empty_stop_strings_never_match() -> None:
    assert first_stop("abc", ("", "c")) == 2


def test_take_holds_back_what_may_become_a_stop() -> None:
    buffer = TextBuffer(("Stop",))
    shown = ""
    for piece in (b"a S", b"t", b"ill S", b"to"):
        buffer.push(piece)
        shown += buffer.take()
    assert shown == "a Still "
    buffer.push(b"p rest")
    buffer.finish()
    assert shown + buffer.take() + buffer.rest() == "a Still "


@pytest.mark.parametrize("stop", [(), ("Q:",), ("\n\n", "Q:", "ab")])
@given(data=st.data())
def test_pieces_do_not_matter(stop: tuple[str, ...], data: st.DataObject) -> None:
    text = data.draw(st.text(alphabet="abQ:\n é€", max_size=30))
    raw = text.encode()
    cuts = sorted(data.draw(st.lists(st.integers(0, len(raw)), max_size=8)))
    buffer, shown = TextBuffer(stop), ""
    for begin, end in zip([0, *cuts], [*cuts, len(raw)], strict=True):
        buffer.push(raw[begin:end])
        shown += buffer.take()
    final = buffer.finish()
    index = first_stop(text, stop)
    assert final == (text if index is None else text[:index])
    assert shown + buffer.take() + buffer.rest() == final
