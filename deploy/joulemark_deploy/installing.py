"""Bringing Joulemark onto a board over ssh: look at it, bring what it lacks, run the install script there, see that the agent is up.

Owns: the order of things, what a board must have, and the words when it has not. Not aware of options or of how progress is shown. Doing it
again changes nothing that is right already, brings only what is missing, and takes an interrupted one up where it was.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from joulemark.errors import BadInput, NotFound, ToolFailed
from joulemark_deploy import release, wheelhouse
from joulemark_deploy.files import SERVICE_FILES, deploy_file
from joulemark_deploy.remote import Board

SCRIPTS = ("install.sh", *SERVICE_FILES)
_LEAST_FREE_KB = 800_000
_PROBE = r"""
say() { printf '%s=%s\n' "$1" "$2"; }
say system "$(uname -s)"
say machine "$(uname -m)"
say user "$(id -u)"
say home "$(cd && pwd)"
python=$(command -v python3 || true)
say python "$([ -n "$python" ] && "$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)"
say venv "$([ -n "$python" ] && "$python" -c 'import ensurepip, venv' 2>/dev/null && echo yes)"
hexadecimal=$(LD_SHOW_AUXV=1 /bin/true | sed -n 's/^AT_HWCAP: *\(0x\)\{0,1\}\([0-9a-f]*\)$/\2/p' | tail -n 1)
say hwcap "$(printf '%d' "0x${hexadecimal:-0}")"
say sudo "$(sudo -n true 2>/dev/null && echo yes)"
say free "$(df -Pk /opt 2>/dev/null | tail -n 1 | tr -s ' ' | cut -d ' ' -f 4)"
say model "$(tr -d '\0' 2>/dev/null </proc/device-tree/model)"
say installed "$(/opt/joulemark/bin/joulemark --version 2>/dev/null)"
"""
_PLAIN_PATH = re.compile(r"^(/[A-Za-z0-9_][A-Za-z0-9_.-]*){1,10}$", re.ASCII)
Tell = Callable[[str], None]


@dataclass(frozen=True)
class Facts:
    """What the board says of itself; empty where it says nothing. `free_kb` of the file system with /opt."""

    machine: str
    home: str
    root: bool
    sudo: bool
    python: str
    venv: bool
    hwcap: int
    free_kb: int | None
    model: str
    installed: str

    @property
    def staging(self) -> str:
        """Where files are brought: the person's own home folder, so that nobody else can put others there before root runs them."""
        return f"{self.home}/.joulemark-install"


@dataclass(frozen=True)
class Wishes:
    """What the person wants to be different from the defaults of deploy/install.sh."""

    host_url: str | None = None
    key_file: Path | None = None
    listen: str | None = None
    name: str | None = None

    def options(self, folder: str) -> list[str]:
        """The install script's options."""
        found: list[str] = []
        for option, value in (("--host-url", self.host_url), ("--listen", self.listen), ("--name", self.name)):
            if value is not None:
                found += [option, value]
        if self.key_file is not None:
            found += ["--enrol-key-file", f"{folder}/{self.key_file.name}"]
        return found


def look(board: Board) -> Facts:
    """Ask the board. Raises ToolFailed when it cannot be reached, BadInput when it is none of ours."""
    said = board.run("sh -s", f"{board.destination} cannot be reached", stdin=_PROBE.encode())
    found = dict(line.split("=", 1) for line in said.splitlines() if "=" in line)
    if found.get("system") != "Linux":
        raise BadInput(
            f"{board.destination} runs no Linux but {found.get('system', 'nothing known')[:40]!r}", "boards run Linux"
        )
    number = {name: text for name, text in found.items() if text.isdecimal() and len(text) < 20}
    return Facts(
        machine=found.get("machine", "")[:40],
        home=_home(found.get("home", "")),
        root=number.get("user") == "0",
        sudo=found.get("sudo") == "yes",
        python=found.get("python", "")[:20],
        venv=found.get("venv") == "yes",
        hwcap=int(number.get("hwcap", 0)),
        free_kb=int(number["free"]) if "free" in number else None,
        model=found.get("model", "")[:200],
        installed=found.get("installed", "")[:80],
    )


def _home(said: str) -> str:
    if not _PLAIN_PATH.match(said):
        raise BadInput(f"the home folder there is {said[:80]!r}", "use an account with a plain home folder")
    return said


def refuse(facts: Facts, at_terminal: bool, from_wheels: bool) -> None:
    """Raises BadInput with what the board lacks and what to do. A release needs no Python there."""
    if facts.machine != "aarch64":
        hint = "on x86: pip install 'joulemark[agent,llama]' there, or deploy/install.sh; 32-bit systems cannot run the engine"
        raise BadInput(f"the board is {facts.machine or 'unknown'}, releases are for aarch64", hint)
    if from_wheels and facts.python not in wheelhouse.GLIBC:
        hint = "leave --wheelhouse out: a release brings its own Python"
        raise BadInput(f"its Python is {facts.python or 'missing'}; {', '.join(wheelhouse.GLIBC)} are known", hint)
    if from_wheels and not facts.venv:
        raise BadInput("its Python cannot make virtual environments", "there: sudo apt-get install python3-venv")
    if not facts.root and not facts.sudo and not at_terminal:
        raise BadInput(
            "sudo asks for a password there, and this is no terminal", "run it from a terminal, or as root@board"
        )
    if facts.free_kb is not None and facts.free_kb < _LEAST_FREE_KB:
        raise BadInput(
            f"only {facts.free_kb / 1e6:.1f} GB are free below /opt", f"{_LEAST_FREE_KB / 1e6:.1f} GB are needed"
        )


def refuse_local_name(host_url: str | None) -> None:
    """Raises BadInput for a host in .local: a release has a C library of its own, without the module that asks by mDNS."""
    name = urlsplit(host_url or "").hostname or ""
    if name.endswith(".local"):
        hint = "say the host's address in numbers (`hostname -I` there), or install with --wheelhouse"
        raise BadInput(f"{name} would not be resolved on the board", hint)


def parts_of_release(path: Path, facts: Facts) -> tuple[list[Path], list[str]]:
    """(files to bring, the install script's options) for a release. Raises BadInput when it is for another processor."""
    _same_processor(release.read(path), path, facts)
    return [path], ["--release", f"{facts.staging}/{path.name}"]


def parts_of_wheelhouse(folder: Path, facts: Facts) -> tuple[list[Path], list[str]]:
    """(files to bring, the install script's options) for the board's Python. Raises NotFound, BadInput."""
    made = wheelhouse.read(folder)
    if facts.python not in made.pythons:
        raise NotFound(
            f"{folder} has no wheels for Python {facts.python}", f"joulemark wheelhouse build --python {facts.python}"
        )
    if broken := wheelhouse.faults(folder):
        raise BadInput(f"{folder} cannot be used: {broken[0]}", "build the wheelhouse again")
    _same_processor(made, folder, facts)
    tag = facts.python.replace(".", "")
    paths = [folder / name for name in made.pythons[facts.python]]
    paths += [folder / wheelhouse.MANIFEST, folder / f"requirements-cp{tag}.txt"]
    return paths, ["--wheelhouse", facts.staging]


def _same_processor(made: wheelhouse.Wheelhouse | release.Release, path: Path, facts: Facts) -> None:
    if made.hwcap & ~facts.hwcap:
        hint = f"build it with --target for this board: {facts.model or 'see its maker'}"
        raise BadInput(f"the engine in {path} ({made.instruction_set}) is for another processor", hint)


def stage(
    board: Board,
    facts: Facts,
    parts: Sequence[Path],
    key_file: Path | None,
    tell: Tell,
    sent: Callable[[int, int], None],
) -> None:
    """Bring what the board lacks of these files, the scripts, and the key. `sent(done, total)` counts bytes."""
    tell("looking at what the board has already")
    paths = [*parts, *(deploy_file(name) for name in SCRIPTS), *([key_file] if key_file is not None else [])]

    def told(path: Path, done: int, total: int) -> None:
        tell(f"bringing {path.name}")
        sent(done, total)

    board.bring(paths, facts.staging, told)


def install(
    board: Board, facts: Facts, options: Sequence[str], wishes: Wishes, each_line: Callable[[str], None]
) -> None:
    """Run the script there and take away what was brought. Raises ToolFailed with its last words."""
    words = ["sh", f"{facts.staging}/install.sh", *options, *wishes.options(facts.staging)]
    _as_root(board, facts, words, "Joulemark could not be installed there", each_line)
    board.run(f"rm -rf {facts.staging}", "what was brought could not be taken away")


def uninstall(board: Board, facts: Facts, purge: bool, each_line: Callable[[str], None]) -> None:
    """Remove service, rules and program; with `purge` data and options too."""
    board.bring([deploy_file(name) for name in SCRIPTS], facts.staging)
    words = ["sh", f"{facts.staging}/install.sh", "--uninstall", *(["--purge"] if purge else [])]
    _as_root(board, facts, words, "Joulemark could not be removed there", each_line)
    board.run(f"rm -rf {facts.staging}", "what was brought could not be taken away")


def warnings(board: Board, facts: Facts) -> list[str]:
    """What the doctor there finds, in lines; a board that cannot be examined says nothing."""
    script = (
        "import json, subprocess, sys; out = subprocess.run(['/opt/joulemark/bin/joulemark', 'doctor', '--json'], "
        "capture_output=True, text=True).stdout; "
        "[print(f['status'], f['area'] + ':', f['text'], '→', f['fix']) for f in json.loads(out) if f['status'] in ('warning', 'problem')]"
    )
    try:
        said = board.run(f"/opt/joulemark/bin/python -c {shlex.quote(script)}", "the doctor could not be asked")
    except ToolFailed:
        return []
    return said.splitlines()


def _as_root(board: Board, facts: Facts, words: Sequence[str], failure: str, each_line: Callable[[str], None]) -> None:
    command = shlex.join(words)
    if facts.root or facts.sudo:
        prefix = "" if facts.root else "sudo -n "
        board.run(prefix + command, failure, each_line=lambda line: each_line(line.decode("utf-8", "replace").rstrip()))
    else:
        board.run_at_terminal(f"sudo {command}", failure)
