"""Evaluate one model file on this machine without agent or host: the same worker, scorer, sampler, journal and record as on a board.

Owns the output folder: journal (an interrupted evaluation resumes there), records, and lm-eval's result and sample files. Not aware of
the terminal: progress goes to a callback.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from joulemark import artifact, documents, packs, plugins
from joulemark.errors import NotFound
from joulemark.wire import DeviceFacts, Manifest, Metric, RunRecord, RunSpec, RunState, content_id
from joulemark_agent import bandwidth
from joulemark_agent.jobs import Jobs
from joulemark_agent.journal import Journal
from joulemark_agent.profiles import device_facts, load_profiles, match, own_folder
from joulemark_agent.sampling import open_sensors
from joulemark_agent.sysfs import Roots
from joulemark_agent.workplace import Machine

POLL_S = 0.2


@dataclass(frozen=True)
class LocalFiles:
    """A library of the one model and the packs of a single command; files stay where they are. `model` is the first of its files."""

    model: Path
    artifact_id: str
    model_manifest: Manifest
    packs: dict[str, Path]

    def manifest(self, artifact_id: str) -> Manifest:
        """The one manifest. Raises NotFound for another id."""
        if artifact_id != self.artifact_id:
            raise NotFound(f"artifact {artifact_id[:12]}… is not the model of this command", "use the same model file")
        return self.model_manifest

    manifest_of = manifest

    def model_path(self, artifact_id: str) -> Path:
        """The model file."""
        self.manifest(artifact_id)
        return self.model

    def pack_path(self, pack_id: str) -> Path:
        """A rendered pack."""
        if pack_id not in self.packs:
            raise NotFound(f"pack {pack_id[:12]}… was not rendered by this command", "use the same tasks")
        return self.packs[pack_id]


def local_machine(
    roots: Roots,
    device_id: str,
    name: str | Callable[[], str],
    profile: str | None,
    replay: Path | None,
    note: Path | None = None,
) -> Machine:
    """This machine, matched to its profile; its memory bandwidth is measured when a run begins. A host may give it another name at any
    time: then `name` is asked for. `note`: see Machine; without it no run may set the machine."""
    chosen = match(load_profiles(own=own_folder(roots)), roots, profile)
    sensors, absent = open_sensors(chosen, roots, None)
    channels = tuple(channel for sensor in sensors for channel in sensor.channels)
    for sensor in sensors:
        sensor.close()
    meters = tuple(channel for channel in channels if channel.quantity in ("power", "energy"))

    def facts(measured: Metric) -> DeviceFacts:
        called = name if isinstance(name, str) else name()
        return device_facts(chosen, roots, device_id, called, meters, absent, measured)

    return Machine(
        profile=chosen,
        roots=roots,
        facts=facts,
        bandwidth=lambda: bandwidth.measure(roots),
        replay=replay,
        note=note,
    )


def render_packs(
    tasks: Sequence[str], cache: Path, folder: Path, progress: Callable[[int, int], None]
) -> dict[str, Path]:
    """Pack ids and files of the tasks, in order; data sets are fetched into the cache when they are not there."""
    rendered: dict[str, Path] = {}
    for task in tasks:
        module = plugins.load(packs.TASKS, task)
        pack = packs.render(task, documents.load(module.DATASET, cache, progress))
        path = folder / f"{task}.pack.json"
        rendered[packs.write(pack, path)] = path
    return rendered


def prepare(model: Path, rendered: dict[str, Path], name: str | None) -> LocalFiles:
    """Examine the model: a GGUF file, or the folder of an artifact. Raises ModelRejected, NotFound, BadInput."""
    if model.is_dir():
        manifest = artifact.read_manifest(model)
        return LocalFiles(model / manifest.files[0].path, content_id(manifest), manifest, rendered)
    manifest = artifact.describe(model, name)
    return LocalFiles(model, content_id(manifest), manifest, rendered)


def make_spec(base: RunSpec, files: LocalFiles, pack_id: str, journal: Journal) -> RunSpec:
    """The run for a pack: an unfinished one of the same settings is taken up again, else a new id."""
    wanted = base.model_copy(update={"artifact_id": files.artifact_id, "pack_id": pack_id})
    for known in journal.runs("queued", "running"):
        if known.model_copy(update={"run_id": wanted.run_id}) == wanted:
            return known
    return wanted.model_copy(update={"run_id": f"run-{uuid.uuid4().hex[:16]}"})


def evaluate(
    files: LocalFiles,
    base: RunSpec,
    machine: Machine,
    output: Path,
    watch: Callable[[RunState, str], None],
) -> list[RunRecord]:
    """Run all packs one after the other; returns their records in order. Stopping it (KeyboardInterrupt) keeps what is done."""
    output.mkdir(parents=True, exist_ok=True)
    journal = Journal(output / "journal.sqlite")
    jobs = Jobs(journal, files, machine, lambda run_id, body: _write(output / f"record_{run_id}.json", body))
    try:
        specs = [make_spec(base, files, pack_id, journal) for pack_id in files.packs]
        for spec in specs:
            jobs.submit(spec)
        jobs.start()
        return [_await(jobs, spec, files, watch) for spec in specs]
    finally:
        jobs.stop()
        journal.close()


def _await(jobs: Jobs, spec: RunSpec, files: LocalFiles, watch: Callable[[RunState, str], None]) -> RunRecord:
    task = files.packs[spec.pack_id].name.removesuffix(".pack.json")
    while True:
        state = jobs.state(spec.run_id)
        watch(state, task)
        if state.status not in ("queued", "running"):
            return RunRecord.model_validate_json(jobs.record(spec.run_id))
        time.sleep(POLL_S)


def _write(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".{path.name}.part")
    temporary.write_bytes(data)
    temporary.replace(path)
