"""`joulemark flash`: reads options, asks before a disk is overwritten, shows progress; `joulemark.__main__` shows errors."""

from __future__ import annotations

import contextlib
import getpass
import os
import pwd
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from joulemark import sources
from joulemark.credentials import parse_enrolment_key
from joulemark.errors import BadInput, Conflict, NotFound
from joulemark_deploy import disks, flashing, installing, release
from joulemark_deploy.card import Card, Wifi, check_card, wifi_of
from joulemark_deploy.targets import TARGETS, Target, target_of

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
_KEY_NAMES = ("id_ed25519.pub", "id_ecdsa.pub", "id_rsa.pub")
_MOST_SMALL_BYTES = 16_384


@app.callback()
def joulemark() -> None:
    """Make cards that report in by themselves."""


@app.command()
def flash(
    image: Annotated[
        Path, typer.Argument(help="The system's image as published: .img, or packed as .xz, .gz, .bz2, .zip.")
    ],
    board: Annotated[str, typer.Option(help=f"Which board: {', '.join(TARGETS)}.")],
    device: Annotated[
        Path | None, typer.Option(help="The card's disk, such as /dev/sdX. Everything on it is lost.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="A file instead of a card; needs no root.")] = None,
    host_url: Annotated[
        str | None, typer.Option(help="The host to enrol at, such as https://192.168.1.10:8443.")
    ] = None,
    enrol_key_file: Annotated[
        Path | None,
        typer.Option(help="The one-time key of `joulemark host token`; removed here once it is on the card."),
    ] = None,
    hostname: Annotated[
        str | None, typer.Option(help="The board's name; default: the name given with --board.")
    ] = None,
    listen: Annotated[
        str | None, typer.Option(help="Address and port to serve on there; default: 127.0.0.1:8090.")
    ] = None,
    wifi: Annotated[str | None, typer.Option(help="The network's name; the password is asked for.")] = None,
    wifi_country: Annotated[str | None, typer.Option(help="Where the radio is used, two letters: DE, GB, US …")] = None,
    wifi_password_file: Annotated[
        Path | None, typer.Option(help="A file with the password, instead of asking.")
    ] = None,
    wifi_hidden: Annotated[bool, typer.Option("--wifi-hidden", help="The network does not say its name.")] = False,
    user: Annotated[str | None, typer.Option(help="Who may log in over ssh; default: your own name here.")] = None,
    ssh_key: Annotated[
        list[Path] | None,
        typer.Option(help="A public key that may log in; may be given again. Default: yours in ~/.ssh."),
    ] = None,
    packed: Annotated[
        Path | None,
        typer.Option("--release", help="A release; default: one is built for the board and kept in the cache."),
    ] = None,
    sha256: Annotated[str | None, typer.Option(help="The image file's checksum as its maker publishes it.")] = None,
    accept_license: Annotated[
        bool,
        typer.Option("--accept-license", help="Jetson: you accept NVIDIA's licence, which the first start would show."),
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask before the disk is overwritten.")] = False,
) -> None:
    """Write a card that needs no screen and no keyboard: it starts, joins the network, enrols at the host, and measures.

    Example: joulemark flash raspios-lite.img.xz --board pi4 --device /dev/sdX --wifi HOME --wifi-country DE --host-url https://192.168.1.10:8443
    --enrol-key-file board.key
    """
    target = target_of(board)
    place = _place(device, out)
    installing.refuse_local_name(host_url)
    if enrol_key_file is not None and host_url is None:
        raise BadInput("--enrol-key-file needs --host-url", "say where the host is: --host-url https://ADDRESS:8443")
    own_name, home = _person()
    card = check_card(
        Card(
            hostname=hostname or target.name,
            user=user or own_name,
            ssh_keys=_ssh_keys(ssh_key, home),
            wifi=_wifi(wifi, wifi_country, wifi_password_file, wifi_hidden),
            host_url=host_url,
            enrolment_key=parse_enrolment_key(_small_text(enrol_key_file)).text()
            if enrol_key_file is not None
            else None,
            listen=listen,
            licence_accepted=accept_license,
        )
    )
    if isinstance(place, disks.Disk) and not yes:
        _ask(place)
    title = _write(flashing.Source(image.expanduser(), sha256), place, card, target, packed)
    if enrol_key_file is not None:
        enrol_key_file.expanduser().unlink()
    _tell_end(card, target, title, device or out)


def _place(device: Path | None, out: Path | None) -> disks.Disk | Path:
    """Where the image goes. Raises BadInput for none or two places, Conflict for a file that is there, and what `disks.choose` raises."""
    if device is not None and out is None:
        return disks.choose(device)
    if out is None or device is not None:
        raise BadInput("say where the image goes", "--device /dev/sdX for a card, or --out FILE")
    if out.expanduser().exists():
        raise Conflict(f"{out} is there already", "remove it, or choose another name with --out")
    return out.expanduser()


def _write(source: flashing.Source, place: disks.Disk | Path, card: Card, target: Target, packed: Path | None) -> str:
    """With a release that is built if need be, and with bars; gives the title of the image's first boot."""
    with _bars(Console(stderr=True)) as (tell, progress):
        path = (
            packed.expanduser()
            if packed is not None
            else release.current(target, sources.default_cache(), tell, progress)
        )
        flashing.refuse_release(path, target)
        if isinstance(place, disks.Disk):
            return flashing.to_disk(source, place, card, path, tell, progress)
        return flashing.to_file(source, place, card, path, tell, progress)


def _ask(disk: disks.Disk) -> None:
    """Raises Conflict when the person does not agree, or nobody is there to be asked."""
    agreed = False
    with contextlib.suppress(typer.Abort):
        agreed = typer.confirm(f"{disk}. Everything on it will be lost. Write it?", err=True)
    if not agreed:
        raise Conflict("nothing was written", "lsblk shows which disk is the card; --yes does not ask")


def _tell_end(card: Card, target: Target, title: str, place: Path | None) -> None:
    typer.echo(f"✓ {place}: {target.title}, first boot by {title}")
    if not card.ssh_keys:
        typer.echo("  nobody can log in there over ssh: no public key was found in ~/.ssh; --ssh-key FILE names one")
    if card.enrolment_key is None:
        typer.echo(
            "  it does not know its host: `joulemark enrol` on the board, or --host-url with --enrol-key-file here"
        )
    else:
        typer.echo(
            "  put it into the board and switch it on; `joulemark devices` on the host shows it after its first start"
        )


def _ssh_keys(given: list[Path] | None, home: Path) -> tuple[str, ...]:
    """The keys in these files, or the person's own."""
    if given:
        return tuple(line for path in given for line in _small_text(path).splitlines() if line.strip())
    found = [path for name in _KEY_NAMES if (path := home / ".ssh" / name).is_file()]
    return tuple(_small_text(path).strip() for path in found[:1])


def _person() -> tuple[str, Path]:
    """(name, home folder) of who sits here, also behind sudo, without which few may write a disk."""
    behind_sudo = os.environ.get("SUDO_USER", "") if os.geteuid() == 0 else ""
    if behind_sudo not in ("", "root"):
        with contextlib.suppress(KeyError):
            entry = pwd.getpwnam(behind_sudo)
            return entry.pw_name.lower(), Path(entry.pw_dir)
    name = getpass.getuser().lower()
    return ("pi" if name == "root" else name), Path.home()


def _wifi(name: str | None, country: str | None, password_file: Path | None, hidden: bool) -> Wifi | None:
    if name is None:
        if country or password_file or hidden:
            raise BadInput("which network?", "say its name with --wifi")
        return None
    if password_file is not None:
        password = _small_text(password_file).strip("\r\n")
    elif sys.stdin.isatty():
        password = getpass.getpass(f"Password of {name}: ")
    else:
        raise BadInput(
            "the network's password cannot be asked for: this is no terminal", "give --wifi-password-file FILE"
        )
    return wifi_of(name, password, country, hidden)


def _small_text(path: Path) -> str:
    try:
        with path.expanduser().open("rb") as file:
            return file.read(_MOST_SMALL_BYTES).decode("utf-8", "replace").strip()
    except OSError as error:
        raise NotFound(f"{path} cannot be read: {error.strerror}", "give the path of a file") from error


@contextlib.contextmanager
def _bars(console: Console) -> Generator[tuple[flashing.Tell, flashing.Progress]]:
    """A spinner with the step's name, and a bar over its bytes."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bars:
        task = bars.add_task("begin", total=None)

        def tell(words: str) -> None:
            bars.reset(task, description=words, total=None)

        def progress(done: int, total: int) -> None:
            bars.update(task, completed=done, total=total)

        yield tell, progress
