"""One evaluation with an agent that this machine reaches: bring model and tasks there, run each task, keep each record.

Every run gets a new run id. A run that the person interrupts is cancelled on the agent too. An agent that belongs to a host takes only
what that host has signed: `dispatch` signs. Not aware of servers; what is shown goes to the console that is passed in.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from joulemark.wire import Manifest, RunSpec, RunState
from joulemark_host.client import AgentClient
from joulemark_host.dispatch import Dispatch, new_run_id
from joulemark_host.shelf import Shelf
from joulemark_host.terminal import transfer_bar


@dataclass(frozen=True)
class Subject:
    """What is evaluated: one artifact on some tasks (`packs` is pack id by task)."""

    artifact_id: str
    manifest: Manifest
    packs: Mapping[str, str]


def push(
    client: AgentClient,
    shelf: Shelf,
    subject: Subject,
    console: Console,
    dispatch: Dispatch | None = None,
    downgrade: bool = False,
    limit_rate: float | None = None,
) -> int:
    """Brings everything to the agent; what it has already is not sent, what is uploaded with at most `limit_rate` bytes a second.

    Returns how many model files were missing.
    """
    order = None
    if dispatch is not None and client.takes_orders_only():
        device_id = client.device().device_id
        dispatch.push(device_id, subject.manifest, downgrade)
        order = dispatch.fetch_order(device_id, subject.artifact_id)
    with transfer_bar(console, f"push {subject.manifest.title} to {client.url}") as progress:
        missing = client.push_artifact(subject.artifact_id, subject.manifest, shelf.file, progress, order, limit_rate)
        for pack_id in subject.packs.values():
            client.push_pack(pack_id, shelf.pack_bytes(pack_id))
    return missing


def run_task(
    client: AgentClient,
    subject: Subject,
    task: str,
    options: Mapping[str, Any],
    console: Console,
    dispatch: Dispatch | None = None,
) -> bytes:
    """Runs one task and returns the record's bytes, whatever became of the run. `options` are fields of RunSpec."""
    spec = RunSpec(run_id=new_run_id(task), artifact_id=subject.artifact_id, pack_id=subject.packs[task], **options)
    order = None
    if dispatch is not None and client.takes_orders_only():
        dispatch.queue(client.device().device_id, spec, subject.manifest, task)
        order = dispatch.run_order(spec.run_id)
    columns = (
        SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    )  # fmt: skip
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        shown = progress.add_task(f"{task}: waiting", total=spec.limit)

        def show(state: RunState) -> None:
            words = state.phase or state.status
            progress.update(
                shown, description=f"{task}: {words}", completed=state.items_done, total=state.items_total or spec.limit
            )

        client.start_run(spec, order)
        try:
            state = client.watch(spec.run_id, show)
        except KeyboardInterrupt:
            client.cancel(spec.run_id)
            raise
    console.print(f"✓ {task}: {state.status}, {state.items_done} of {state.items_total} items", markup=False)
    return client.record(spec.run_id)
