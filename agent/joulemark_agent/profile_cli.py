"""`joulemark profile`: show the profile of this board, check one, write a first one, record a board's kernel files for others.

Reads options and shows results; what is compared is profile_check.py's. Exit status 1 when a check finds a problem.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from joulemark.durable import replace_file
from joulemark.errors import BadInput, Conflict
from joulemark_agent import machine, profile_check, recorded_tree, tuning
from joulemark_agent.findings import to_json
from joulemark_agent.local_view import findings_table
from joulemark_agent.profiles import DeviceProfile, load_profiles, match, own_folder, read_profile
from joulemark_agent.programs import ask
from joulemark_agent.sysfs import Roots, Unreadable

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
profile_app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None)
app.add_typer(profile_app, name="profile")

Tree = Annotated[
    Path | None, typer.Option(help="A board's recorded tree (`joulemark profile record`) instead of this machine.")
]


@app.callback()
def joulemark() -> None:
    """Evaluate compressed language models on this board."""


@profile_app.callback()
def profile() -> None:
    """What Joulemark knows about a board: how it is recognised, its meters and which of them is the whole board, its limits.

    Profiles are TOML files; your own go into /etc/joulemark/device_profiles and win over shipped ones of the same name.
    """


@contextmanager
def _board(tree: Path | None) -> Generator[Roots]:
    if tree is None:
        yield Roots()
        return
    try:
        text = tree.expanduser().read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(
            f"the recorded tree {tree} cannot be read: {error}", "`joulemark profile record` writes one"
        ) from error
    with tempfile.TemporaryDirectory(prefix="joulemark-tree-") as folder:
        yield recorded_tree.plant(text, Path(folder))


def _chosen(name: str | None, roots: Roots) -> DeviceProfile:
    """The profile of that file or name, or the one that matches."""
    if name is not None and (name.endswith(".toml") or "/" in name):
        return read_profile(Path(name).expanduser())
    return match(load_profiles(own=own_folder(roots)), roots, name)


@profile_app.command()
def show(
    name: Annotated[str | None, typer.Argument(help="A profile's name or file; default: the one that matches.")] = None,
    tree: Tree = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
) -> None:
    """Show the profile of this board, or any other, and what profiles there are.

    Examples: joulemark profile show; joulemark profile show raspberry-pi-5 --json
    """
    with _board(tree) as roots:
        found = _chosen(name, roots)
        known = [profile.id for profile in load_profiles(own=own_folder(roots))]
        if as_json:
            sys.stdout.write(json.dumps(found.model_dump(mode="json"), indent=2, ensure_ascii=False) + "\n")
            return
        table = Table(title=escape(f"{found.title} ({found.id})"), show_header=False)
        for field, text in _rows(found, roots, shown_here=name is None):
            table.add_row(field, escape(text))
        Console().print(table)
        Console().print(escape(f"all profiles: {', '.join(known)}"))


def _rows(found: DeviceProfile, roots: Roots, shown_here: bool) -> list[tuple[str, str]]:
    rules = [f"{rule}: {', '.join(values)}" for rule, values in found.match.model_dump().items() if values]
    sensors = [f"{use.use} {json.dumps(use.options)}" if use.options else use.use for use in found.sensors]
    limits = [f"{name} {value:g}" for name, value in found.limits.model_dump().items() if value is not None]
    rows = [
        ("recognised by", "; ".join(rules) or "any machine"),
        ("engines", ", ".join(found.backends)),
        ("sensors", "\n".join(sensors) or "none"),
        ("memory", ", ".join(f"{size / 2**30:g} GiB" for size in found.memory_bytes) or "not stated"),
        ("memory bandwidth", f"{found.memory_bandwidth / 1e9:g} GB/s" if found.memory_bandwidth else "not stated"),
        ("power modes", ", ".join(found.power_modes) or "none"),
        ("limits", ", ".join(limits) or "not stated"),
        ("idle window", f"{found.idle_s:g} s"),
    ]
    if found.without_meter:
        rows.append(("without a meter", found.without_meter))
    if shown_here:
        rows.append(("this board", machine.model_name(roots) or "gives no name"))
        rows.append(("power mode now", tuning.power_mode(roots) or "none"))
        rows.append(("clock limits now", tuning.clock_limits(roots) or "not shown by the kernel"))
    return rows


@profile_app.command()
def check(
    name: Annotated[str | None, typer.Argument(help="A profile's name or file; default: the one that matches.")] = None,
    tree: Tree = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Try a profile on this board: does it match, are its sensors there, is a channel the whole board? Nothing is changed.

    Examples: joulemark profile check my-board.toml; joulemark profile check jetson-nano --tree nano.txt
    """
    with _board(tree) as roots:
        findings = profile_check.check(_chosen(name, roots), roots)
    if as_json:
        sys.stdout.write(to_json(findings) + "\n")
    else:
        Console().print(findings_table(findings))
    raise typer.Exit(int(any(finding.status == "problem" for finding in findings)))


@profile_app.command()
def new(
    name: Annotated[str, typer.Argument(help="Its name: letters, digits, dots, dashes.")],
    out: Annotated[Path | None, typer.Option(help="The file to write; default: NAME.toml here.")] = None,
    tree: Tree = None,
) -> None:
    """Write a first profile of this board from what it says of itself. What only you know stands in comments: fill it in.

    Then: joulemark profile check NAME.toml, and copy it to /etc/joulemark/device_profiles/
    """
    path = (out or Path(f"{name}.toml")).expanduser()
    if path.stem != name or path.suffix != ".toml":
        raise BadInput(f"{path.name} is not {name}.toml", "a profile's file has its name")
    if path.exists():
        raise Conflict(f"{path} is there already", "choose another name, or remove it first")
    with _board(tree) as roots:
        text = profile_check.draft(name, roots)
    replace_file(path, [text.encode()])
    try:
        read_profile(path)
    except BadInput:
        path.unlink()
        raise
    typer.echo(f"✓ {path}\nnext: fill in what its comments ask, then `joulemark profile check {path}`")


@profile_app.command()
def record(
    out: Annotated[Path, typer.Argument(help="The text file to write.")],
    title: Annotated[str, typer.Option(help="A line about the board: model, memory, system.")] = "",
) -> None:
    """Record this board's kernel files and firmware answers in one text file, to check a profile elsewhere or to report a fault.

    Serial numbers and network addresses are left out; read it before you send it.
    """
    roots, path = Roots(), out.expanduser()
    if path.exists():
        raise Conflict(f"{path} is there already", "choose another name, or remove it first")
    answers = {" ".join(command): ask(roots, command) for command in recorded_tree.program_commands()}
    given = {name: text for name, text in answers.items() if not isinstance(text, Unreadable)}
    text = recorded_tree.record(roots, title or machine.model_name(roots) or "unnamed board", given)
    replace_file(path, [text.encode()])
    typer.echo(f"✓ {path}: {text.count(' = ')} files")
