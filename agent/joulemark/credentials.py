"""Secrets that people and boards show: one-time enrolment keys and lasting credentials; as text, and how they are compared.

    jme.<id>.<secret>.<fingerprint>     enrolment key: enrols once, at the host with this fingerprint
    jmc.<id>.<secret>                   credential: shown with every request (Authorization: Bearer)

`id` finds the row, `secret` is 256 random bits. Only the secret's sha256 is stored: with so much randomness nothing slower is needed.
The texts never appear in `repr` nor in an error. Pure.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from dataclasses import dataclass, field

from joulemark.errors import BadInput

_ID = r"[0-9a-f]{16}"
_SECRET = r"[A-Za-z0-9_-]{43}"
_ENROLMENT_KEY = re.compile(rf"jme\.({_ID})\.({_SECRET})\.([0-9a-f]{{64}})")
_CREDENTIAL = re.compile(rf"jmc\.({_ID})\.({_SECRET})")


@dataclass(frozen=True)
class Credential:
    """What a board or a person shows with every request."""

    id: str
    secret: str = field(repr=False)

    def text(self) -> str:
        """As it is stored by its owner and sent."""
        return f"jmc.{self.id}.{self.secret}"


@dataclass(frozen=True)
class EnrolmentKey:
    """What enrols a board or a person once. `fingerprint` names the host, so that nobody else can pose as it."""

    id: str
    secret: str = field(repr=False)
    fingerprint: str

    def text(self) -> str:
        """As it is handed over."""
        return f"jme.{self.id}.{self.secret}.{self.fingerprint}"


def new_id() -> str:
    """64 random bits that name a secret without telling it."""
    return secrets.token_hex(8)


def new_secret() -> str:
    """256 random bits as text."""
    return secrets.token_urlsafe(32)


def parse_credential(text: str) -> Credential | None:
    """The credential in a text; None when it is none (whoever asks decides what that means)."""
    match = _CREDENTIAL.fullmatch(text.strip())
    return Credential(*match.groups()) if match else None


def parse_enrolment_key(text: str) -> EnrolmentKey:
    """The enrolment key in a text. Raises BadInput without repeating the text."""
    match = _ENROLMENT_KEY.fullmatch(text.strip())
    if match is None:
        raise BadInput(
            "this is no enrolment key (jme.….….…)", "`joulemark host token` on the host prints one: copy the whole line"
        )
    return EnrolmentKey(*match.groups())


def digest(secret: str) -> str:
    """What is stored of a secret."""
    return hashlib.sha256(secret.encode()).hexdigest()


def matches(secret: str, stored: str) -> bool:
    """Whether `stored` is this secret's digest, in a time that does not depend on where they differ."""
    return hmac.compare_digest(digest(secret), stored)
