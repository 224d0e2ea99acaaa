"""The one command: `joulemark COMMAND …`. Finds the program that owns a command and starts it, and nothing else is imported.

So it starts on a board that has only the agent, and a command whose program is not installed says which extra brings it. The one place
where the commands' errors are caught broadly. Exit status: 0 done, 1 it failed (the message says why and what to do), 2 wrong usage.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from joulemark import __version__
from joulemark.errors import INTERRUPTED, JoulemarkError, to_problem


@dataclass(frozen=True)
class Command:
    """Where a command lives. `module` has a typer application `app` with a command of this name."""

    module: str
    extra: str
    summary: str


_AGENT = "joulemark_agent.cli"
_PROFILE = "joulemark_agent.profile_cli"
_EXPORTER = "joulemark_exporter.cli"
_DEPLOY = "joulemark_deploy.cli"
_FLASH = "joulemark_deploy.flash_cli"
_HOST = "joulemark_host.cli"
_FLEET = "joulemark_host.fleet_cli"
_QUEUE = "joulemark_host.queue_cli"
_ROLLOUT = "joulemark_host.rollout_cli"
_STICK = "joulemark_host.stick_cli"

COMMANDS: dict[str, Command] = {
    "demo": Command(_HOST, "host", "the whole path on this machine: a real model to a heatmap"),
    "eval": Command(_AGENT, "agent", "evaluate a model file or an artifact here, without a host"),
    "verify": Command(_AGENT, "agent", "where a result or artifact comes from, offline; or compare with lm-eval"),
    "doctor": Command(_AGENT, "agent", "what this machine has, what it lacks, and what to do about it"),
    "profile": Command(
        _PROFILE, "agent", "what is known about this board's meters and limits: show, check, new, record"
    ),
    "agent": Command(_AGENT, "agent", "serve this board: take models and tasks, run them, report"),
    "export": Command(_EXPORTER, "export", "turn a model into a verified artifact: fold, quantize, write, verify"),
    "adapter": Command(_EXPORTER, "export", "write a LoRA adapter as a GGUF file for hot-swapping"),
    "wheelhouse": Command(_DEPLOY, "deploy", "wheels for boards, which then need no compiler: build, check"),
    "release": Command(_DEPLOY, "deploy", "one file with everything for a board, its own Python too: build"),
    "flash": Command(_FLASH, "deploy", "write a card that starts, enrols and measures by itself"),
    "install": Command(_DEPLOY, "deploy", "put the agent on a board over ssh, as a service; nothing is compiled there"),
    "upgrade": Command(_DEPLOY, "deploy", "bring a board's agent to this version; one that is not ready is undone"),
    "uninstall": Command(_DEPLOY, "deploy", "take the agent off a board over ssh"),
    "enrol": Command(_AGENT, "agent", "make this board known to a host, with a one-time key"),
    "run-bundle": Command(
        _AGENT, "agent", "on a board without a network: carry out a stick's orders, put records on it"
    ),
    "host": Command(_FLEET, "host", "serve artifacts, take records, draw the grid; init, token"),
    "discover": Command(_FLEET, "host", "find agents on the local network, with their fingerprints; trusts nobody"),
    "devices": Command(_FLEET, "host", "list boards; approve, rename, revoke them"),
    "publish": Command(_HOST, "host", "put a model or task packs on the host's shelf"),
    "push": Command(_HOST, "host", "bring a published artifact to boards"),
    "rollout": Command(_ROLLOUT, "host", "bring an artifact to many boards in stages; errors stop it"),
    "artifacts": Command(_QUEUE, "host", "list the artifacts on boards, and how far they are"),
    "run": Command(_HOST, "host", "evaluate an artifact on a board and wait for the record"),
    "sweep": Command(_QUEUE, "host", "evaluate every model on every task on every board"),
    "runs": Command(_QUEUE, "host", "list or cancel the runs that wait or are going on"),
    "export-bundle": Command(_STICK, "host", "write what a board without a network has to do onto a stick"),
    "import-results": Command(_STICK, "host", "take the records that a stick brings back"),
    "records": Command(_HOST, "host", "list the records that the host has"),
    "evidence": Command(_FLEET, "host", "a record with all its signatures in one file, for `verify`"),
    "heatmap": Command(_HOST, "host", "draw device × model as HTML and PNG"),
}


def overview() -> str:
    """What `joulemark --help` says."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: joulemark COMMAND [OPTIONS]",
            "",
            "Which compressed language model should run on this board, and what does one correct answer cost there?",
            "",
            *lines,
            "",
            "joulemark COMMAND --help explains a command; joulemark --version prints the version.",
            "A first try: joulemark doctor, then joulemark demo.",
        ]
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit status (2 for a command that does not exist or is not installed)."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] in ("-h", "--help", "help"):
        sys.stdout.write(overview() + "\n")
        return 0 if given else 2
    if given[0] in ("-V", "--version"):
        sys.stdout.write(f"joulemark {__version__}\n")
        return 0
    command = COMMANDS.get(given[0])
    if command is None:
        import difflib

        near = difflib.get_close_matches(given[0], COMMANDS, 1)
        meant = f"did you mean `joulemark {near[0]}`? " if near else ""
        sys.stderr.write(
            f"joulemark: there is no command {given[0][:80]!r}\n  hint: {meant}`joulemark --help` lists them\n"
        )
        return 2
    try:
        program = importlib.import_module(command.module)
    except ImportError as error:
        sys.stderr.write(
            f"joulemark: `{given[0]}` needs a part that is not installed ({error})\n"
            f"  hint: pip install 'joulemark[{command.extra}]'\n"
        )
        return 2
    return run(program.app, given)


def run(application: Callable[..., Any], arguments: Sequence[str]) -> int:
    """Run a typer application (typer itself is not imported here: a board may lack it) and turn its errors into words."""
    try:
        status = int(application(args=list(arguments), prog_name="joulemark", standalone_mode=False) or 0)
        if status == INTERRUPTED:
            sys.stderr.write("joulemark: stopped; what was finished is kept\n")
        return status
    except (JoulemarkError, OSError) as error:
        problem = to_problem(error)
        sys.stderr.write(f"joulemark: {problem.message}\n" + (f"  hint: {problem.hint}\n" if problem.hint else ""))
        return 1
    except ModuleNotFoundError as error:
        # A command imports what is heavy when it is called: a part that is not installed is missed only then.
        if (error.name or "").startswith("joulemark"):
            raise
        sys.stderr.write(f"joulemark: {error.name} is not installed\n  hint: pip install {error.name}\n")
        return 1
    except Exception as error:
        # Leaving early and usage errors are click's: they carry their exit status. Anything else is a defect and keeps its traceback.
        status = getattr(error, "exit_code", None)
        if status is None:
            raise
        show = getattr(error, "show", None)
        if show is not None:
            show()
        return int(status)


if __name__ == "__main__":
    sys.exit(main())
