"""The agent's commands: agent, eval, verify, doctor. Reads options and hands on; errors are shown by `joulemark.__main__`."""

from __future__ import annotations

import getpass
import platform
from pathlib import Path
from typing import Annotated

import typer

from joulemark import signing
from joulemark.errors import BadInput, Conflict
from joulemark_agent.sysfs import Roots

DEFAULT_DATA = Path("~/.local/share/joulemark/agent")

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.callback()
def joulemark() -> None:
    """Evaluate compressed language models on this board: accuracy, latency, memory and joules of the same file."""


@app.command()
def agent(
    data: Annotated[
        Path, typer.Option(help="Folder that the agent owns: identity, artifacts, journal, outbox.")
    ] = DEFAULT_DATA,
    listen: Annotated[
        str, typer.Option(help="Address and port to serve on; port 0 takes a free one.")
    ] = "127.0.0.1:8090",
    host_url: Annotated[
        str | None,
        typer.Option(help="The host to enrol at with --enrol-key-file, or an open host (a trial on loopback)."),
    ] = None,
    enrol_key_file: Annotated[
        Path | None, typer.Option(help="Enrol with the key in this file at the first start, and remove it then.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="What people call this board; default: its host name.")] = None,
    profile: Annotated[str | None, typer.Option(help="Device profile; default: the one that matches.")] = None,
    replay: Annotated[
        Path | None, typer.Option(help="Play this recorded trace back as a meter (for trials; results say so).")
    ] = None,
    limit_rate: Annotated[
        float | None,
        typer.Option(min=0.01, help="Fetch artifacts at so many MB/s at most, to leave the network to others."),
    ] = None,
    store_limit: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="GB that models may take here; the least recently used one that no queued run needs gives way. Default: the disk's space.",
        ),
    ] = None,
    announce: Annotated[
        bool | None,
        typer.Option(help="Tell the local network by mDNS that the agent is here. Default: when others can reach it."),
    ] = None,
    open_to_all: Annotated[
        bool,
        typer.Option("--open", help="For a trial: let everybody on this machine in, on loopback, with nothing signed."),
    ] = False,
) -> None:
    """Serve this board: take models and task packs, run them one at a time, deliver the records.

    Once: joulemark enrol https://workstation:8443. Then: joulemark agent --listen 0.0.0.0:8090
    """
    from joulemark_agent.server import serve
    from joulemark_agent.settings import Settings

    settings = Settings(
        data=data.expanduser(),
        name=name or platform.node() or "board",
        host_url=host_url,
        open_to_all=open_to_all,
        announce=announce,
        limit_rate=limit_rate * 1e6 if limit_rate is not None else None,
        store_bytes=int(store_limit * 1e9) if store_limit is not None else None,
        key_file=enrol_key_file.expanduser() if enrol_key_file is not None else None,
        profile=profile,
        replay=replay,
    )
    serve(settings, listen)


@app.command()
def enrol(
    host_url: Annotated[str, typer.Argument(help="The host's address, such as https://workstation:8443.")],
    key_file: Annotated[
        Path | None, typer.Option(help="File with the one-time key; without it the key is asked for, unseen.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="What people call this board; default: its host name.")] = None,
    profile: Annotated[str | None, typer.Option(help="Device profile; default: the one that matches.")] = None,
    data: Annotated[Path, typer.Option(help="The agent's data folder.")] = DEFAULT_DATA,
    leave: Annotated[bool, typer.Option("--leave", help="Leave the host that this board belongs to now.")] = False,
    stick: Annotated[
        Path | None,
        typer.Option(
            help="A folder on a USB stick, for a board that cannot reach its host: once to ask, once with the answer."
        ),
    ] = None,
) -> None:
    """Make this board known to a host, once, with a key that `joulemark host token` printed there.

    The key names the host, so that no other can pose as it. Start the agent (again) afterwards.

    Without a network: joulemark enrol https://workstation:8443 --key-file STICK/board.key --stick STICK; then on the host
    `joulemark devices admit STICK`; then the first command again.
    """
    from joulemark_agent import identity
    from joulemark_agent.server import enrol as enrol_here
    from joulemark_agent.server import enrol_by_stick, read_key_file
    from joulemark_agent.settings import Settings

    who = identity.load(data.expanduser() / "identity")
    if who.membership is not None:
        if not leave:
            raise Conflict(
                f"this board belongs to {who.membership.host_url} as {who.membership.name!r} already",
                "say --leave to enrol elsewhere; its records that are still here go to the new host",
            )
        identity.leave(who)
        who = identity.load(who.folder)
    key = read_key_file(key_file.expanduser()) if key_file is not None else getpass.getpass("one-time key: ")
    settings = Settings(data=data.expanduser(), name=name or platform.node() or "board", profile=profile)
    if stick is None:
        enrolled = enrol_here(settings, who, host_url, key)
    elif (by_stick := enrol_by_stick(settings, who, host_url, key, stick.expanduser())) is not None:
        enrolled = by_stick
    else:
        typer.echo(f"✓ this board's request is on the stick, key {signing.key_id(who.key.public)}")
        typer.echo("next: `joulemark devices admit STICK` on the host, then this command here once more")
        return
    assert enrolled.membership is not None
    if key_file is not None:
        key_file.expanduser().unlink()
    typer.echo(f"✓ enrolled at {host_url} as {enrolled.membership.name!r}, key {signing.key_id(enrolled.key.public)}")
    typer.echo("next: `joulemark devices approve` on the host, unless the key said so; then start the agent here")


@app.command(name="run-bundle")
def run_bundle(
    stick: Annotated[Path, typer.Argument(help="The folder on the stick that `joulemark export-bundle` wrote.")],
    agent: Annotated[str, typer.Option(help="Where this board's agent listens.")] = "http://127.0.0.1:8090",
    data: Annotated[Path, typer.Option(help="The agent's data folder.")] = DEFAULT_DATA,
    wait: Annotated[bool, typer.Option(help="Wait for the runs and put their records on the stick.")] = True,
) -> None:
    """Give this board's agent what a stick brings, and put the records on it. Done again, it goes on where it stopped.

    Example: joulemark run-bundle /media/stick; then on the host: joulemark import-results /media/stick
    """
    from joulemark.bundles import Bundle
    from joulemark_agent import identity
    from joulemark_agent import stick as sticks
    from joulemark_agent.gate import local_token
    from joulemark_agent.local_view import bytes_bar

    who = identity.load(data.expanduser() / "identity")
    if who.membership is None:
        raise BadInput("this board belongs to no host yet", "joulemark enrol HOST_URL --key-file KEY --stick STICK")
    bundle = Bundle(stick.expanduser())
    orders = sticks.read_orders(bundle, who)
    with sticks.LocalAgent(who, agent, local_token(who.folder)) as running:
        with bytes_bar("models from the stick") as progress:
            sticks.bring(running, bundle, orders, progress)
        if not wait:
            typer.echo("✓ the agent has everything; run this again for the records")
            return
        said: dict[str, str] = {}

        def watch(run_id: str, words: str) -> None:
            if said.get(run_id) != words:
                typer.echo(f"{run_id}: {words}")
                said[run_id] = words

        there = sticks.collect(running, bundle, orders, watch)
    typer.echo(
        f"✓ {there} record{'s are' if there != 1 else ' is'} on the stick: joulemark import-results {stick} on the host"
    )


@app.command(name="eval")
def evaluate(
    model: Annotated[Path, typer.Argument(help="A GGUF file, or the folder of an exported artifact.")],
    task: Annotated[str, typer.Option(help="Tasks, separated by commas.")] = "arc_challenge,gsm8k_cot",
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first documents of each task.")] = None,
    out: Annotated[
        Path, typer.Option(help="Folder for records and lm-eval files; an interrupted run resumes there.")
    ] = Path("results"),
    threads: Annotated[int | None, typer.Option(min=1, help="Engine threads; default: all usable cores.")] = None,
    sequences: Annotated[int, typer.Option(min=1, max=200, help="Answers generated side by side.")] = 16,
    context: Annotated[int | None, typer.Option(min=16, help="Context length; default: the model's own.")] = None,
    backend: Annotated[
        str | None, typer.Option(help="Engine; default: the profile's first that opens the file.")
    ] = None,
    profile: Annotated[str | None, typer.Option(help="Device profile; default: the one that matches.")] = None,
    replay: Annotated[
        Path | None, typer.Option(help="Play this recorded trace back as a meter (results say so).")
    ] = None,
    idle: Annotated[
        float | None, typer.Option(min=0.5, help="Seconds of idle window before the run; default: the profile's.")
    ] = None,
    governor: Annotated[
        str | None, typer.Option(help="Frequency governor while the run lasts, such as performance; then as before.")
    ] = None,
    power_mode: Annotated[
        str | None, typer.Option(help="A Jetson's power mode while the run lasts, by name or number; then as before.")
    ] = None,
    fix_clocks: Annotated[
        bool,
        typer.Option(
            "--fix-clocks",
            help="Processor and graphics clocks at their upper limits while the run lasts; then as before.",
        ),
    ] = False,
    anyway: Annotated[bool, typer.Option("--anyway", help="Begin also while the supply's voltage is too low.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print summaries as JSON instead of a table.")] = False,
) -> None:
    """Evaluate a model on this machine: no host, no agent, the same worker, scorer, sampler and record as on a board.

    Example: joulemark eval model.gguf --task arc_challenge,gsm8k_cot --limit 50 --out results
    """
    from joulemark.wire import RunSpec
    from joulemark.wishes import tuning_of
    from joulemark_agent.local_view import run_and_show

    base = RunSpec(
        run_id="run",
        artifact_id="0" * 64,
        pack_id="0" * 64,
        limit=limit,
        threads=threads,
        sequences=sequences,
        context_tokens=context,
        backend=backend,
        idle_s=idle,
        anyway=anyway,
        tuning=tuning_of(governor, power_mode, fix_clocks),
    )
    names = [part.strip() for part in task.split(",") if part.strip()]
    if not names:
        raise BadInput("no task was named", "for example --task arc_challenge")
    raise typer.Exit(run_and_show(model.expanduser(), names, base, out.expanduser(), Roots(), profile, replay, as_json))


@app.command()
def verify(
    thing: Annotated[
        Path,
        typer.Argument(
            help="Evidence of a result, the folder of an artifact; with --against: our samples_*.jsonl, or a folder with one."
        ),
    ],
    against: Annotated[Path | None, typer.Option(help="lm-eval's samples_*.jsonl of the same task.")] = None,
    host: Annotated[
        str | None, typer.Option(help="Fingerprint of the host whose word counts; `joulemark host init` printed it.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was found as JSON.")] = False,
) -> None:
    """Check where a result or an artifact comes from, offline; or compare a result with lm-eval's item by item.

    Exit status 1 when something does not hold. Examples: joulemark verify run.evidence.json --host 3f0c…;
    joulemark verify exported/smollm2-gptq4; joulemark verify results --against samples_arc_challenge_2026.jsonl
    """
    from joulemark_agent.local_view import show_comparison, show_lineage

    if against is not None:
        raise typer.Exit(show_comparison(thing, against, as_json))
    raise typer.Exit(show_lineage(thing, host, as_json))


@app.command()
def doctor(
    data: Annotated[Path, typer.Option(help="The agent's data folder, for the free space.")] = DEFAULT_DATA,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Say what this machine has: cores, memory, bandwidth, engines, meters, clock, contention; and what to do about problems."""
    from joulemark_agent.local_view import show_findings

    raise typer.Exit(show_findings(Roots(), data.expanduser(), as_json))
