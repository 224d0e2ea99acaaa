"""What the host's commands show in a terminal: tables of results and records, progress bars. Text is never markup.

Not aware of where records come from. Units are chosen for people by `joulemark_host.readable`.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from datetime import datetime, timezone

from rich import filesize
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table
from rich.text import Text

from joulemark.metrics import METRICS
from joulemark.plain_text import printable
from joulemark.protocol import DeviceRow
from joulemark.wire import Absent, Measure, Metric
from joulemark_host.compare import artifact_label
from joulemark_host.discovering import Found
from joulemark_host.facts import RunFacts
from joulemark_host.holdings import Target
from joulemark_host.readable import amount, interval, unit_for
from joulemark_host.registry import Event
from joulemark_host.rollout import Board, Rollout
from joulemark_host.run_queue import QueuedRun

SHOWN_METRICS = (
    "accuracy",
    "ttft_p50",
    "itl_p50",
    "itl_p95",
    "prefill_rate",
    "decode_rate",
    "items_rate",
    "bandwidth_utilisation",
    "peak_pss",
    "peak_temperature",
    "energy_per_token",
    "energy_per_correct",
    "idle_power",
    "load_time",
    "wall_time",
    "truncated_share",
)


def result_table(runs: Sequence[RunFacts]) -> Table:
    """One column a run, one row a figure, with intervals; figures that no run has are left to `absences`."""
    models = {artifact_label(run.model, run.quantization) for run in runs}
    boards = {run.device_name for run in runs}
    table = Table(title=Text(f"{' / '.join(sorted(models))} on {' / '.join(sorted(boards))}"), header_style="bold")
    table.add_column("figure")
    for run in runs:
        model = f"\n{artifact_label(run.model, run.quantization)}" if len(models) > 1 else ""
        table.add_column(Text(run.task + model), justify="right", overflow="fold")
    for name in SHOWN_METRICS:
        metrics = [run.metrics.get(name) for run in runs]
        if any(isinstance(metric, Measure) for metric in metrics):
            unit = METRICS[name].unit
            table.add_row(Text(METRICS[name].title), *(_figure(metric, unit) for metric in metrics))
    table.add_section()
    table.add_row(Text("verdict"), *(_verdict(run) for run in runs))
    return table


def absences(runs: Sequence[RunFacts]) -> list[str]:
    """A line for every figure that no run has: its title and the reason; figures with the same reason share a line."""
    by_reason: dict[str, list[str]] = {}
    for name in SHOWN_METRICS:
        metrics = [run.metrics.get(name) for run in runs if run.status == "done"]
        if metrics and all(isinstance(metric, Absent) for metric in metrics):
            reasons = {metric.reason for metric in metrics if isinstance(metric, Absent)}
            by_reason.setdefault("; ".join(sorted(reasons)), []).append(METRICS[name].title)
    return [f"no figure for {' / '.join(titles)}: {reason}" for reason, titles in by_reason.items()]


def explanations(runs: Sequence[RunFacts]) -> list[str]:
    """A line for every reason of every verdict that is not VALID, and for every problem."""
    lines: list[str] = []
    for run in runs:
        lines += [f"{run.task}: {reason}" for reason in run.reasons]
        if run.problem is not None:
            hint = f" Next step: {run.problem.hint}" if run.problem.hint else ""
            lines.append(f"{run.task}: {run.problem.message}.{hint}")
    return lines


def records_table(runs: Sequence[RunFacts]) -> Table:
    """One line a run, latest last."""
    table = Table(header_style="bold")
    for title in ("received", "run", "device", "model", "task", "status", "accuracy", "decode"):
        table.add_column(title, justify="right" if title in ("accuracy", "decode") else "left", overflow="fold")
    for run in runs:
        status = run.status if run.status != "done" else ("valid" if run.valid else "not valid")
        cells = (
            _when(run.received_at),
            run.run_id,
            run.device_name,
            artifact_label(run.model, run.quantization),
            run.task,
            status,
        )
        figures = (_figure(run.metrics.get(name), METRICS[name].unit, False) for name in ("accuracy", "decode_rate"))
        table.add_row(*(Text(cell) for cell in cells), *figures)
    return table


def bar(console: Console, title: str) -> AbstractContextManager[Callable[[int, int], None]]:
    """A progress bar for work that reports `(done, total)`; without a terminal one line when it is over."""
    return _bar(console, title, TaskProgressColumn())


def transfer_bar(console: Console, title: str) -> AbstractContextManager[Callable[[int, int], None]]:
    """The same for bytes: how many of how many, how fast, how long still."""
    return _bar(console, title, DownloadColumn(), TransferSpeedColumn())


@contextmanager
def _bar(console: Console, title: str, *amounts: ProgressColumn) -> Generator[Callable[[int, int], None], None, None]:
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), *amounts, TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(title, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total or None)
    console.print(Text(f"✓ {printable(title)}"))


def _figure(metric: Metric | None, unit: str, with_interval: bool = True) -> Text:
    if not isinstance(metric, Measure):
        return Text("–")
    shown = unit_for(unit, [metric.value])
    spread = interval(metric, shown).removesuffix(f" {shown.symbol}") if with_interval else ""
    return Text(amount(metric.value, shown) + (f" ({spread.replace(' – ', '–')})" if spread else ""))


def _verdict(run: RunFacts) -> Text:
    if run.status != "done":
        return Text(run.status.upper(), style="bold red")
    return Text("VALID", style="bold green") if run.valid else Text("NOT VALID", style="bold yellow")


def _when(seconds: float | None) -> str:
    return (
        "–"
        if seconds is None
        else datetime.fromtimestamp(seconds, timezone.utc).astimezone().strftime("%Y-%m-%d %H:%M")
    )


def devices_table(rows: Sequence[DeviceRow], now: float) -> Table:
    """One row a board. `now` is the host's clock."""
    table = Table(header_style="bold")
    for column in ("name", "state", "groups", "key", "last seen", "address", "board"):
        table.add_column(column, overflow="fold")
    styles = {"approved": "green", "pending": "yellow", "revoked": "dim", "cloned": "red"}
    for row in rows:
        seen = "never" if row.seen_at is None else f"{duration(now - row.seen_at)} ago"
        board = row.facts.title if row.facts is not None else ""
        cells = (row.name, row.admission, ", ".join(row.groups), row.key_id, seen, row.address or "", board)
        texts = [Text(printable(cell)) for cell in cells]
        texts[1].stylize(styles[row.admission])
        table.add_row(*texts)
    return table


def events_table(events: Sequence[Event]) -> Table:
    """One row an event, latest last."""
    table = Table(header_style="bold")
    for column in ("when", "who", "what", "about", "detail"):
        table.add_column(column, overflow="fold")
    for event in events:
        when = datetime.fromtimestamp(event.at, timezone.utc).astimezone().strftime("%Y-%m-%d %H:%M:%S")
        table.add_row(*(Text(printable(cell)) for cell in (when, event.who, event.what, event.about, event.detail)))
    return table


def duration(seconds: float) -> str:
    """Seconds as people say them: 12 s, 5 min, 3 h, 2 d."""
    for size, unit in ((86_400.0, "d"), (3600.0, "h"), (60.0, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"


STATE_STYLES = {
    "in_sync": "green",
    "done": "green",
    "error": "red",
    "failed": "red",
    "leased": "cyan",
    "pending": "yellow",
}


def targets_table(targets: Sequence[Target], names: Mapping[str, str]) -> Table:
    """One row an artifact on a board. `names` are the artifacts' by id."""
    table = Table(header_style="bold")
    for column in ("board", "artifact", "state", "received", "problem"):
        table.add_column(column, overflow="fold")
    for target in targets:
        share = _share(target)
        problem = target.problem.message if target.problem is not None else ""
        artifact = names.get(target.artifact_id, target.artifact_id[:12])
        row = [Text(printable(cell)) for cell in (target.device, artifact, target.state, share, problem)]
        row[2].stylize(STATE_STYLES.get(target.state, ""))
        table.add_row(*row)
    return table


def _share(target: Target) -> str:
    if target.received_bytes is None or target.size_bytes is None:
        return ""
    return f"{filesize.decimal(target.received_bytes)} of {filesize.decimal(target.size_bytes)}"


def found_table(found: Sequence[Found]) -> Table:
    """One row an agent that announced itself. All of it is a claim, but for what is proven."""
    table = Table(header_style="bold")
    for column in ("name", "address", "fingerprint", "host", "known here as"):
        table.add_column(
            column, overflow="fold", no_wrap=column in ("address", "fingerprint")
        )  # people compare and copy them
    for one in found:
        said = one.said
        cells = (
            said.name,
            one.url,
            said.device_id.removeprefix("dev-"),
            one.standing,
            one.known_as or "",
        )
        row = [Text(printable(cell)) for cell in cells]
        row[3].stylize("green" if one.standing == "proven" else "yellow")
        table.add_row(*row)
    return table


SHOWN_BOARDS = 8
"""So many boards of a stage have a line of their own; a stage may be a thousand."""


def rollouts_table(rollouts: Sequence[Rollout], now: float) -> Table:
    """One row a stage of a roll-out, and one for every board of it that went wrong or is still waited for. `now` is the host's clock."""
    table = Table(header_style="bold")
    for column in ("roll-out", "stage", "boards", "in sync", "went wrong", "state"):
        table.add_column(column, overflow="fold")
    for rollout in rollouts:
        for number, (stage, boards) in enumerate(zip(rollout.plan.stages, rollout.stages, strict=True)):
            bad = [board for board in boards if board.state == "error"]
            good = sum(board.state == "in_sync" for board in boards)
            current = number == rollout.stage
            state = "waits" if number > rollout.stage else rollout.status if current else "done"
            left = f", {duration(rollout.ends_at - now)} left" if state == "running" else ""
            row = (rollout.plan.name if number == 0 else "", stage.words, len(boards), good, len(bad), state + left)
            cells = [Text(printable(str(cell))) for cell in row]
            cells[5].stylize(STATE_STYLES.get("error" if state == "stopped" else state, ""))
            table.add_row(*cells)
            waited = [board for board in boards if board.state == "pending"] if state == "running" else []
            for name, why in _board_lines([*bad, *waited], now):
                table.add_row("", Text(printable(name), style="dim"), "", "", "", Text(printable(why), style="dim"))
            if rollout.problem and current:
                table.add_row("", "", "", "", "", Text(printable(rollout.problem), style="yellow"))
    return table


def _board_lines(boards: Sequence[Board], now: float) -> list[tuple[str, str]]:
    lines = [(f"  {board.device}", _board_words(board, now)) for board in boards[:SHOWN_BOARDS]]
    return lines + ([(f"  … {more} more", "")] if (more := len(boards) - SHOWN_BOARDS) > 0 else [])


def _board_words(board: Board, now: float) -> str:
    """What went wrong on a board, or what it is at."""
    if board.problem is not None:
        return board.problem.message
    seen = "never seen" if board.seen_at is None else f"seen {duration(now - board.seen_at)} ago"
    if board.received_bytes is None or board.size_bytes is None:
        return seen
    if board.received_bytes < board.size_bytes:
        return f"{filesize.decimal(board.received_bytes)} of {filesize.decimal(board.size_bytes)}, {seen}"
    return f"has it; check: {board.check}" if board.check is not None else f"has it, {seen}"


def queue_table(runs: Sequence[QueuedRun], models: Mapping[str, str]) -> Table:
    """One row a run, in the order of the queue. `models` are names by artifact id."""
    table = Table(header_style="bold")
    for column in ("board", "what", "state", "items", "problem", "run"):
        table.add_column(column, overflow="fold")
    for run in runs:
        items = f"{run.items_done} of {run.items_total}" if run.items_total is not None else ""
        problem = run.problem.message if run.problem is not None else ""
        row = [Text(printable(cell)) for cell in (run.device, run.what(models), run.words, items, problem, run.run_id)]
        row[2].stylize(STATE_STYLES.get(run.status, ""))
        table.add_row(*row)
    return table
