"""What a flashed card carries: who the board is, where its host is, and everything for its first boot.

Owns: the bounds of each setting, and the folder that the first boot installs from. Not aware of images or of how a system starts it: that
is card_formats'. What is in the folder is taken away once it is installed (deploy/first_boot.sh); what is secret lies there until then.

    joulemark/    first_boot.sh   settings.sh   install.sh   install.options (a word a line)   joulemark-first-boot.service   release.tar.gz
                  enrol.key
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from joulemark.errors import BadInput
from joulemark_deploy.files import deploy_file

FOLDER = "joulemark"
UNIT = "joulemark-first-boot.service"
SCRIPT = "first_boot.sh"
SETTINGS = "settings.sh"
KEY_FILE = "enrol.key"
RELEASE = "release.tar.gz"
GROUPS = ("adm", "audio", "dialout", "gpio", "i2c", "netdev", "plugdev", "render", "spi", "sudo", "users", "video")
"""What the person who logs in may use; those that a system has not are left out or made there."""
_HOSTNAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", re.ASCII)
_USER = re.compile(r"[a-z_][a-z0-9_-]{0,30}", re.ASCII)
_TAKEN_USERS = ("root", "joulemark")
_SSH_KEY = re.compile(
    r"(ssh-(ed25519|rsa)|ecdsa-sha2-nistp(256|384|521)|sk-(ssh-ed25519|ecdsa-sha2-nistp256)@openssh\.com)"
    r" [A-Za-z0-9+/]{40,2000}={0,2}( [\w@.+:-]{1,200})?",
    re.ASCII,
)
_COUNTRY = re.compile(r"[A-Z]{2}", re.ASCII)
_PSK = re.compile(r"[0-9a-f]{64}", re.ASCII)


@dataclass(frozen=True)
class Wifi:
    """A network. `key` is the 256-bit key that WPA derives from name and password, so that the password itself is on no card."""

    name: str
    key: str = field(repr=False)
    country: str
    hidden: bool = False


@dataclass(frozen=True)
class Card:
    """The settings of one card; `check_card` has seen them. Nobody can log in when `ssh_keys` is empty."""

    hostname: str
    user: str
    ssh_keys: tuple[str, ...]
    wifi: Wifi | None
    host_url: str | None
    enrolment_key: str | None = field(repr=False)
    listen: str | None
    licence_accepted: bool

    def options(self, folder: str) -> list[str]:
        """The install script's options; the key is given while its file is there (first_boot.sh)."""
        found = ["--release", f"{folder}/{RELEASE}", "--name", self.hostname]
        if self.host_url is not None:
            found += ["--host-url", self.host_url]
        if self.listen is not None:
            found += ["--listen", self.listen]
        return found

    def files(self, folder: str, release: Path, settings: str, after: str) -> Mapping[str, bytes | Path]:
        """What lies in the folder, which is at this path on the running board. `settings` are run as root before the agent is installed,
        and again after a power cut; `after` is the unit whose work that waits for, if any. The script is last: nothing begins before."""
        unit = deploy_file(UNIT).read_text("utf-8").replace("@FOLDER@", folder).replace("@AFTER@", after)
        files: dict[str, bytes | Path] = {
            RELEASE: release,
            "install.sh": deploy_file("install.sh"),
            "install.options": "".join(f"{word}\n" for word in self.options(folder)).encode(),
            SETTINGS: settings.encode(),
            UNIT: unit.encode(),
        }
        if self.enrolment_key is not None:
            files[KEY_FILE] = f"{self.enrolment_key}\n".encode()
        files[SCRIPT] = deploy_file(SCRIPT)
        return files


def check_card(card: Card) -> Card:
    """The same card. Raises BadInput for a setting that the board, its shell or its configuration files would misread."""
    if not _HOSTNAME.fullmatch(card.hostname):
        raise BadInput(f"{card.hostname[:80]!r} is no host name", "small letters, digits and hyphens, 63 at most")
    if not _USER.fullmatch(card.user) or card.user in _TAKEN_USERS:
        raise BadInput(
            f"{card.user[:80]!r} cannot be the name of who logs in",
            "give another one with --user: small letters and digits",
        )
    for key in card.ssh_keys:
        if not _SSH_KEY.fullmatch(key):
            # Not shown: it may be the private one.
            raise BadInput(
                "what was given is no public ssh key", "give the file that ends in .pub, as ssh-keygen wrote it"
            )
    for option, value in (("--host-url", card.host_url), ("--listen", card.listen)):
        if value is not None and not re.fullmatch(r"[\w:/.\[\]%-]{1,200}", value, re.ASCII):
            raise BadInput(f"{option}: {value[:80]!r} cannot be used", "letters, digits, and : / . [ ] % - are")
    return card


def wifi_of(name: str, password: str, country: str | None, hidden: bool) -> Wifi:
    """Raises BadInput for what WPA does not allow. `password` may be the derived key itself."""
    if not 1 <= len(name.encode()) <= 32 or not name.isprintable():
        raise BadInput(f"{name[:40]!r} is no network's name", "1 to 32 bytes, without control characters")
    if country is None or not _COUNTRY.fullmatch(country):
        raise BadInput(
            "without the country a board's radio stays off",
            "say it with two capital letters: --wifi-country DE, GB, US …",
        )
    if _PSK.fullmatch(password):
        return Wifi(name, password, country, hidden)
    if not 8 <= len(password) <= 63 or not password.isascii() or not password.isprintable():
        raise BadInput("that is no Wi-Fi password", "WPA takes 8 to 63 plain characters")
    # IEEE 802.11i, annex H.4
    key = hashlib.pbkdf2_hmac("sha1", password.encode(), name.encode(), 4096, 32).hex()
    return Wifi(name, key, country, hidden)
