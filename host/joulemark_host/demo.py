"""The whole path on one machine: a real model and real tasks, a host and an agent as processes, records, a heatmap.

The same parts as between a workstation and boards, over loopback; nothing is simulated. What was started is stopped,
also on Ctrl-C and on errors; the logs stay when something failed.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx
from rich.console import Console

from joulemark import signing, tls
from joulemark.errors import JoulemarkError, NotFound, Unavailable
from joulemark.wire import RunRecord
from joulemark_host import charts, identity, page
from joulemark_host.client import AgentClient
from joulemark_host.dispatch import Dispatch
from joulemark_host.evaluation import push, run_task
from joulemark_host.facts import RunFacts
from joulemark_host.figures import Figure, draw
from joulemark_host.identity import HostIdentity
from joulemark_host.options import database_url, identity_folder, subject_of
from joulemark_host.processes import Child, free_port
from joulemark_host.records import Records
from joulemark_host.registry import Registry
from joulemark_host.shelf import Shelf
from joulemark_host.terminal import absences, explanations, result_table

MODEL = "smollm2-135m-instruct-q4_1"
TASKS = ("arc_challenge", "gsm8k_cot")
METRICS = ("accuracy", "decode_rate", "ttft_p50", "peak_pss")
START_S = 60.0
DELIVERY_S = 60.0
DYING_S = 2.0
"""A killed process closes its sockets a moment before it is gone."""


@dataclass(frozen=True)
class Servers:
    """A host and an agent that reports to it, both answering."""

    host_url: str
    identity: HostIdentity
    records: Records
    dispatch: Dispatch
    agent: AgentClient
    agent_process: Child


def demonstrate(out: Path, limit: int, keep: Path | None, console: Console) -> None:
    """Runs everything and writes `heatmap.html` and `heatmap.png` into `out`. `keep` is a data folder that stays."""
    out.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    with _data_folder(keep, console) as data:
        shelf = Shelf(data / "host" / "shelf")
        subject = subject_of(shelf, MODEL, ",".join(TASKS), console)
        with servers(data, console) as running:
            push(running.agent, shelf, subject, console, running.dispatch)
            for task in TASKS:
                record = run_task(running.agent, subject, task, {"limit": limit}, console, running.dispatch)
                await_delivery(running.records, record, console)
            runs = [run for run in running.records.facts() if run.artifact_id == subject.artifact_id][-len(TASKS) :]
    _report(runs, out, console)
    console.print(f"\nDone in {time.monotonic() - started:.0f} s.")


@contextmanager
def servers(data: Path, console: Console) -> Generator[Servers, None, None]:
    """A host and an agent that reports to it, both ready; stopped at the end, the agent first."""
    host_listen, agent_listen = (f"127.0.0.1:{free_port()}" for _ in range(2))
    folder = identity_folder(data / "host")
    who = identity.read(folder) if identity.exists(folder) else identity.create(folder)
    host_url = f"https://{host_listen}"
    host_arguments = ["host", "--listen", host_listen, "--data", str(data / "host"), "--tls"]
    with Child("host", host_arguments, data / "host.log") as host:
        with console.status("start the host"):
            await_host(host_url, who, host.check)
        console.print(f"✓ host on {host_url}", markup=False)
        agent_arguments = ["agent", "--listen", agent_listen, "--data", str(data / "agent"), "--host-url", host_url]
        agent_arguments += ["--enrol-key-file", str(_key_file(data, who))]
        with Child("agent", agent_arguments, data / "agent.log") as child:
            agent = AgentClient(f"http://{agent_listen}", who)
            with console.status("start the agent"):
                agent.wait_ready(START_S, child.check)
            console.print(f"✓ agent on {agent.url}, enrolled: {agent.device().title}", markup=False)
            url = database_url(data / "host", None)
            records, dispatch = Records(url), Dispatch(url, who.key)
            try:
                yield Servers(host_url, who, records, dispatch, agent, child)
            except JoulemarkError:
                console.print(f"the agent's log ends so:\n{child.tail()}", markup=False, highlight=False)
                child.check(DYING_S)
                raise
            finally:
                agent.close()
                dispatch.close()
                records.close()
        console.print("✓ host and agent stopped")


def await_host(url: str, who: HostIdentity, alive: Callable[[], None]) -> None:
    """Returns once the host answers under its own certificate, or raises Unavailable."""
    deadline = time.monotonic() + START_S
    with httpx.Client(verify=tls.pinned(who.authority_pem, tls.HOST_NAME), trust_env=False) as http:
        while True:
            alive()
            try:
                http.get(f"{url}/healthz").raise_for_status()
            except httpx.HTTPError as error:
                if time.monotonic() > deadline:
                    raise Unavailable(f"the host at {url} does not answer: {error}", "look at its log") from error
                time.sleep(0.1)
            else:
                return


def _key_file(data: Path, who: HostIdentity) -> Path:
    """A one-time key for the demonstration's board, in a file as it lies on a flashed card."""
    registry = Registry(database_url(data / "host", None), who.fingerprint)
    try:
        key = registry.issue_key("device", "the demonstration", approved=True)
    finally:
        registry.close()
    path = data / "enrol.key"
    signing.write_secret(path, key.text())
    return path


def await_delivery(records: Records, record: bytes, console: Console) -> None:
    """Waits until the agent's outbox has brought the record to the host, byte for byte."""
    run_id = RunRecord.model_validate_json(record).spec.run_id
    deadline = time.monotonic() + DELIVERY_S
    with console.status("deliver the record"):
        while True:
            with suppress(NotFound):
                if records.raw(run_id) == record:
                    return
            if time.monotonic() > deadline:
                raise Unavailable(
                    f"the record of {run_id} did not reach the host within {DELIVERY_S:g} s", "look at the agent's log"
                )
            time.sleep(0.2)


def _report(runs: list[RunFacts], out: Path, console: Console) -> None:
    console.print(result_table(runs))
    for line in (*explanations(runs), *absences(runs)):
        console.print(f"  {line}", markup=False, highlight=False)
    figures = chosen_figures(runs)
    with console.status("draw the heatmap"):
        (out / "heatmap.html").write_text(page.offline_page(figures), "utf-8")
        (out / "heatmap.png").write_bytes(charts.png([figure.chart for figure in figures if figure.chart]))
    console.print(f"\n✓ {out / 'heatmap.html'}\n✓ {out / 'heatmap.png'}", markup=False)


def chosen_figures(runs: list[RunFacts]) -> list[Figure]:
    """Accuracy on every task, then what it costs on the first."""
    first = runs[0].task
    return [draw(runs, "accuracy", run.task) for run in runs] + [draw(runs, name, first) for name in METRICS[1:]]


@contextmanager
def _data_folder(keep: Path | None, console: Console) -> Generator[Path, None, None]:
    """`keep`, or a temporary folder that is removed when all went well and stays, named, when something failed."""
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
        yield keep.absolute()
        return
    folder = Path(tempfile.mkdtemp(prefix="joulemark-demo-"))
    try:
        yield folder
    except BaseException:
        console.print(f"data and logs of the demonstration are in {folder}", markup=False)
        raise
    shutil.rmtree(folder)
