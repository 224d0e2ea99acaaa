"""The host's commands about its fleet: host, host init, host token, devices. Options in, words and exit status out.

They work on the host's data folder: whoever may read it is its operator.
"""

from __future__ import annotations

import getpass
import json
import sys
import time
from pathlib import Path
from typing import Annotated, Literal

import typer

from joulemark.durable import replace_file
from joulemark.errors import NotFound
from joulemark_host.options import (
    DEFAULT_DATA,
    DatabaseOption,
    DataOption,
    JsonOption,
    ShelfOption,
    commands,
    database_url,
    hand_down,
    host_identity,
    identity_folder,
    open_dispatch,
    open_records,
    open_registry,
    open_shelf,
    terminal,
)

CLOCK_OFF_S = 60.0
"""By so much a board's clock may be off without a word."""
app = commands("The workstation's side: its boards and the people who use it.")
host_app = typer.Typer(invoke_without_command=True, pretty_exceptions_enable=False, rich_markup_mode=None)
devices_app = typer.Typer(invoke_without_command=True, pretty_exceptions_enable=False, rich_markup_mode=None)
app.add_typer(host_app, name="host")
app.add_typer(devices_app, name="devices")


@host_app.callback()
def host(
    context: typer.Context,
    data: DataOption = DEFAULT_DATA,
    shelf_at: ShelfOption = None,
    database: DatabaseOption = None,
    listen: Annotated[
        str, typer.Option(help="Address and port to serve on; port 0 takes a free one.")
    ] = "127.0.0.1:8080",
    tls: Annotated[
        bool, typer.Option("--tls", help="TLS on loopback too; beyond loopback there is always TLS.")
    ] = False,
    max_record_bytes: Annotated[int, typer.Option(min=1024, help="The largest record that is taken.")] = 64 * 2**20,
    lease: Annotated[
        float,
        typer.Option(min=1, help="Seconds after which the run of a board that says nothing returns to the queue."),
    ] = 900.0,
    open_to_all: Annotated[
        bool,
        typer.Option("--open", help="For a trial: let everybody on this machine in, on loopback, with nothing signed."),
    ] = False,
) -> None:
    """Serve the artifact shelf, let boards enrol, take their records, and show the grid as a page.

    Once: joulemark host init. Then for example: joulemark host --listen 0.0.0.0:8443
    """
    if hand_down(context, data, database):
        return
    from joulemark_host import identity
    from joulemark_host.access import Access
    from joulemark_host.api import create_app
    from joulemark_host.dispatch import Dispatch
    from joulemark_host.server import bind, names_of, own_names, serve
    from joulemark_http.listening import is_loopback

    folder = identity_folder(data)
    if not open_to_all and not identity.exists(folder):
        raise NotFound(
            f"this host has no identity in {folder} yet",
            "`joulemark host init` makes one, once; for a trial on this machine alone: joulemark host --open",
        )
    with bind(listen, known_callers=not open_to_all) as listener:
        records = open_records(data, database, max_record_bytes)
        registry = None if open_to_all else open_registry(data, database)
        who = None if open_to_all else identity.read(folder)
        certificate = None
        if who is not None and (tls or not is_loopback(listener)):
            identity.certify_server(who, own_names(listener))
            certificate = who.server_file
        names = names_of(listener.getsockname()[0])
        dispatch = Dispatch(database_url(data, database), who.key, lease_s=lease) if who is not None else None
        try:
            app = create_app(
                open_shelf(data, shelf_at), records, names, access=Access(registry), identity=who, dispatch=dispatch
            )
            serve(app, listener, certificate)
        finally:
            records.close()
            if dispatch is not None:
                dispatch.close()
            if registry is not None:
                registry.close()


@host_app.command()
def init(data: DataOption = DEFAULT_DATA, as_json: JsonOption = False) -> None:
    """Make this host's key and certificate authority, once. Boards that enrol trust them from then on: keep a copy of the folder.

    Example: joulemark host init
    """
    from joulemark_host import identity

    made = identity.create(identity_folder(data))
    if as_json:
        sys.stdout.write(json.dumps({"folder": str(made.folder), "fingerprint": made.fingerprint}) + "\n")
        return
    console = terminal()
    console.print(f"✓ identity in {made.folder}\n  fingerprint {made.fingerprint}", markup=False, highlight=False)
    console.print(
        "next: `joulemark host` serves, `joulemark host token` lets a board in", markup=False, highlight=False
    )


@host_app.command()
def token(
    role: Annotated[
        Literal["device", "operator", "viewer"], typer.Option(help="What the key is for: a board, or a person.")
    ] = "device",
    approve: Annotated[bool, typer.Option("--approve", help="The board needs no further approval.")] = False,
    hours: Annotated[float, typer.Option(min=0.01, max=24 * 90, help="How long the key can be used.")] = 24.0,
    out: Annotated[Path | None, typer.Option(help="Write the key to this file (mode 0600) instead.")] = None,
    data: DataOption = DEFAULT_DATA,
    database: DatabaseOption = None,
) -> None:
    """Print a one-time key that lets one board or one person in. It names this host, so that no other can pose as it.

    Example: joulemark host token --approve --out board.key; on the board: joulemark enrol https://workstation:8443 --key-file board.key
    """
    registry = open_registry(data, database)
    try:
        key = registry.issue_key(role, _me(), approved=approve, life_s=hours * 3600)
    finally:
        registry.close()
    if out is not None:
        replace_file(out.expanduser(), [key.text().encode() + b"\n"], mode=0o600)
        terminal(quiet=True).print(f"✓ {out}", markup=False)
    else:
        sys.stdout.write(key.text() + "\n")
    where = "on the board: joulemark enrol HOST_URL" if role == "device" else "in a browser: HOST_URL/enter"
    terminal(quiet=True).print(f"it works once, for {hours:g} h; {where}", markup=False, highlight=False)


@host_app.command()
def people(
    revoke: Annotated[str | None, typer.Option(help="End this person's credentials.")] = None,
    data: DataOption = DEFAULT_DATA,
    database: DatabaseOption = None,
    as_json: JsonOption = False,
) -> None:
    """List the people who may look (viewer) or decide (operator), or end somebody's credentials.

    Example: joulemark host people --revoke ann
    """
    registry, console = open_registry(data, database), terminal()
    try:
        if revoke is not None:
            registry.revoke_person(revoke, _me())
        known = registry.people()
    finally:
        registry.close()
    if as_json:
        sys.stdout.write(json.dumps([vars(person) for person in known], indent=2) + "\n")
        return
    for person in known:
        console.print(f"{person.name}  {person.role}", markup=False, highlight=False)
    if not known:
        console.print("nobody yet: `joulemark host token --role viewer` lets one in", markup=False)


@app.command()
def discover(
    seconds: Annotated[float, typer.Option(min=0.1, max=60, help="How long to listen.")] = 3.0,
    interface: Annotated[
        list[str] | None, typer.Option(help="Address of this machine to ask from; default: all of them.")
    ] = None,
    data: DataOption = DEFAULT_DATA,
    database: DatabaseOption = None,
    as_json: JsonOption = False,
) -> None:
    """Find agents on the local network (mDNS). Nothing is trusted for being found: compare the fingerprint, then let it enrol with a key.

    `proven`: it has the certificate that this host gave to that board. A board that measures is silent. Example: joulemark discover
    """
    from joulemark_host import discovering
    from joulemark_host.terminal import found_table

    identity, names = host_identity(data), {}
    if identity is not None:
        registry = open_registry(data, database)
        names = {row.device_id: row.name for row in registry.devices()}
        registry.close()
    console = terminal(quiet=True)
    with console.status("listening", spinner="dots") as status:
        found = discovering.discover(
            seconds, identity, names, interface, lambda n: status.update(f"listening: {n} found")
        )
    if as_json:
        sys.stdout.write(json.dumps([one.plain() for one in found], indent=2) + "\n")
        return
    nobody = "nobody answers: is `joulemark agent` running there with --listen 0.0.0.0:8090? Some routers keep multicast from Wi-Fi"
    terminal().print(found_table(found) if found else nobody, markup=False)


@devices_app.callback()
def devices(
    context: typer.Context,
    data: DataOption = DEFAULT_DATA,
    database: DatabaseOption = None,
    as_json: JsonOption = False,
) -> None:
    """List the boards that enrolled here.

    Example: joulemark devices; joulemark devices approve pi5
    """
    if hand_down(context, data, database):
        return
    from joulemark_host.terminal import devices_table, duration

    registry = open_registry(data, database)
    try:
        rows = registry.devices()
    finally:
        registry.close()
    if as_json:
        sys.stdout.write(json.dumps([row.model_dump() for row in rows], indent=2) + "\n")
        return
    console = terminal()
    console.print(
        devices_table(rows, time.time()) if rows else "no boards yet: `joulemark host token` lets one in", markup=False
    )
    for row in rows:
        if row.problem:
            console.print(f"  {row.name}: {row.problem}", markup=False, highlight=False)
        if row.clock_ahead_s is not None and abs(row.clock_ahead_s) > CLOCK_OFF_S:
            way = "ahead" if row.clock_ahead_s > 0 else "behind"
            off = duration(abs(row.clock_ahead_s))
            console.print(
                f"  {row.name}: its clock is {off} {way}; nothing is judged by it", markup=False, highlight=False
            )


NameArgument = Annotated[str, typer.Argument(help="The board's name or id.")]


@devices_app.command()
def admit(
    stick: Annotated[Path, typer.Argument(help="The folder on the stick on which a board left its request.")],
    data: DataOption = DEFAULT_DATA,
    database: DatabaseOption = None,
) -> None:
    """Let a board in that cannot reach this host: reads its request from a stick, leaves the answer there.

    Both hold secrets; the board removes them when it has read the answer. Example: joulemark devices admit /media/stick
    """
    from joulemark.bundles import Bundle
    from joulemark_host import identity
    from joulemark_host.admitting import take_in

    bundle, registry = Bundle(stick.expanduser()), open_registry(data, database)
    try:
        answer = take_in(identity.read(identity_folder(data)), registry, bundle.request(), "a stick")
    finally:
        registry.close()
    bundle.write_answer(answer)
    console = terminal()
    console.print(f"✓ {answer.name} ({answer.device_id}) is {answer.admission}", markup=False, highlight=False)
    console.print("next: the same `joulemark enrol … --stick` on the board once more", markup=False, highlight=False)


@devices_app.command()
def approve(name: NameArgument, data: DataOption = DEFAULT_DATA, database: DatabaseOption = None) -> None:
    """Let a board take part. Compare its key first: `joulemark doctor` on the board shows it.

    Of an identity that was copied: the board that speaks next keeps it.
    """
    _decide(data, database, name, "approve", "approved")


@devices_app.command()
def rename(
    name: NameArgument,
    to: Annotated[str, typer.Argument(help="The new name.")],
    data: DataOption = DEFAULT_DATA,
    database: DatabaseOption = None,
) -> None:
    """Give a board another name. Its records keep the name that it had."""
    registry = open_registry(data, database)
    try:
        registry.rename(name, to, _me())
    finally:
        registry.close()
    terminal().print(f"✓ {name} is now {to}", markup=False)


@devices_app.command()
def group(
    name: Annotated[str, typer.Argument(help="The group's name.")],
    boards: Annotated[list[str] | None, typer.Argument(help="Boards by name or id; without any: who is in it.")] = None,
    remove: Annotated[bool, typer.Option("--remove", help="Take the boards out of the group instead.")] = False,
    data: DataOption = DEFAULT_DATA,
    database: DatabaseOption = None,
) -> None:
    """Put boards into a group, which `push`, `run` and `sweep` take for their names.

    Example: joulemark devices group lab pi5 kitchen; joulemark push model.gguf --to lab
    """
    dispatch, console = open_dispatch(data, database), terminal()
    try:
        if boards:
            dispatch.group(name, list(dispatch.devices(",".join(boards))), member=not remove)
        members = dispatch.groups().get(name, [])
    finally:
        dispatch.close()
    console.print(f"{name}: {', '.join(members) or 'nobody'}", markup=False, highlight=False)


@devices_app.command()
def revoke(name: NameArgument, data: DataOption = DEFAULT_DATA, database: DatabaseOption = None) -> None:
    """End a board's credential for good: a lost card, a board that is given away. Its records stay."""
    _decide(data, database, name, "revoke", "revoked")


@devices_app.command()
def events(
    data: DataOption = DEFAULT_DATA,
    database: DatabaseOption = None,
    limit: Annotated[int, typer.Option(min=1, max=100_000, help="At most so many, the latest.")] = 100,
    as_json: JsonOption = False,
) -> None:
    """What happened to the fleet: keys, enrolments, refusals, decisions."""
    from joulemark_host.terminal import events_table

    registry = open_registry(data, database)
    try:
        happened = registry.events(limit)
    finally:
        registry.close()
    if as_json:
        sys.stdout.write(json.dumps([event.__dict__ for event in happened], indent=2) + "\n")
        return
    terminal().print(events_table(happened), markup=False)


@app.command()
def evidence(
    run_id: Annotated[str, typer.Argument(help="The run whose record is to be shown to others.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="File; default: RUN.evidence.json.")] = None,
    data: DataOption = DEFAULT_DATA,
    database: DatabaseOption = None,
) -> None:
    """Put a record and every signature that it rests on into one file, which `joulemark verify` checks offline.

    Example: joulemark evidence night-arc-0123456789 -o result.evidence.json
    """
    from joulemark_host import identity
    from joulemark_host.evidence import collect

    records, registry, dispatch = (
        open_records(data, database),
        open_registry(data, database),
        open_dispatch(data, database),
    )
    try:
        who = identity.read(identity_folder(data))
        found = collect(who, registry, dispatch, records, run_id)
    finally:
        for opened in (records, registry, dispatch):
            opened.close()
    path = out or Path(f"{run_id}.evidence.json")
    replace_file(path, [found.model_dump_json(by_alias=True).encode()])
    console = terminal()
    console.print(f"✓ {path}\n  joulemark verify {path} --host {who.fingerprint}", markup=False, highlight=False)


def _decide(data: Path, database: str | None, name: str, what: Literal["approve", "revoke"], done: str) -> None:
    registry = open_registry(data, database)
    try:
        device = (registry.approve if what == "approve" else registry.revoke)(name, _me())
    finally:
        registry.close()
    terminal().print(f"✓ {device.name} is {done}", markup=False)


def _me() -> str:
    return f"{getpass.getuser()} at the host"
