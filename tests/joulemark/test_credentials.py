"""Secrets as text: parsed strictly, hidden from logs, compared by digest; and failures that are counted."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from joulemark import credentials
from joulemark.attempts import MAX_PEERS, Attempts
from joulemark.credentials import Credential, EnrolmentKey, parse_credential, parse_enrolment_key
from joulemark.errors import BadInput, TooManyAttempts


def test_texts_come_back_and_hide_from_logs():
    credential = Credential(credentials.new_id(), credentials.new_secret())
    key = EnrolmentKey(credentials.new_id(), credentials.new_secret(), "ab" * 32)
    assert parse_credential(credential.text()) == credential
    assert parse_enrolment_key(f"  {key.text()}\n") == key
    for secret in (credential, key):
        assert secret.secret not in repr(secret) and secret.id in repr(secret)
    assert len({credentials.new_secret() for _ in range(100)}) == 100


def test_a_wrong_text_is_not_repeated():
    for text in ("", "jme.x", "jmc.0011223344556677." + "a" * 43, "secret-password"):
        with pytest.raises(BadInput) as raised:
            parse_enrolment_key(text)
        assert text == "" or text not in str(raised.value)


@given(st.text(max_size=200))
def test_nothing_else_is_a_credential(text: str):
    assert parse_credential(text) is None


def test_only_the_secret_itself_matches_its_digest():
    secret = credentials.new_secret()
    stored = credentials.digest(secret)
    assert credentials.matches(secret, stored)
    assert not credentials.matches(secret[:-1], stored) and not credentials.matches(secret, "0" * 64)
    assert secret not in stored


def test_whoever_fails_too_often_waits_and_others_do_not():
    now = [0.0]
    attempts = Attempts(lambda: now[0], limit=3, window_s=60.0)
    for _ in range(3):
        attempts.failed("mallory")
    with pytest.raises(TooManyAttempts) as raised:
        attempts.failed("mallory")
    assert raised.value.retry_after_s == 60.0
    attempts.failed("bob")
    now[0] = 45.0
    with pytest.raises(TooManyAttempts) as raised:
        attempts.failed("mallory")
    assert raised.value.retry_after_s == 15.0
    now[0] = 60.0
    attempts.failed("mallory")


def test_a_million_addresses_take_no_more_memory_than_the_limit():
    attempts = Attempts(lambda: 0.0)
    for number in range(MAX_PEERS + 1000):
        attempts.failed(str(number))
    assert len(attempts._failures) == MAX_PEERS
