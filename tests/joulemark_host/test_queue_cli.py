"""The commands that watch boards: what they say and leave behind when a person stops watching."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from joulemark.__main__ import main
from joulemark.wire import RunSpec
from joulemark_host import identity, queue_cli
from joulemark_host.dispatch import Dispatch
from joulemark_host.evaluation import Subject
from joulemark_host.options import database_url, identity_folder
from joulemark_host.registry import Registry
from joulemark_host.shelf import Shelf
from tests.fixtures.boards_at_host import Board
from tests.fixtures.fleet import publish_subject


@dataclass
class Desk:
    """A host's data folder with one board that is never there, and a model on the shelf."""

    data: Path
    dispatch: Dispatch
    device_id: str
    subject: Subject


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    data = tmp_path / "host"
    who = identity.create(identity_folder(data))
    url = database_url(data, None)
    registry, dispatch = Registry(url, who.fingerprint), Dispatch(url, who.key)
    board = Board("pi5")
    registry.enrol(board.enrolment(registry.issue_key("device", "test", approved=True)), "192.0.2.5")
    yield Desk(data, dispatch, board.device_id, publish_subject(Shelf(data / "shelf"), tmp_path / "models"))
    registry.close()
    dispatch.close()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["push", "tiny", "--to", "pi5"], "the boards go on fetching; `joulemark artifacts` shows how far"),
        (["rollout", "tiny", "--stage", "pi5"], "the roll-out goes on; `joulemark rollout --name tiny` shows it"),
    ],
)
def test_ctrl_c_ends_the_watching_only_and_says_so(
    desk: Desk, arguments: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    interrupt_at_first_wait(monkeypatch)
    with pytest.raises(SystemExit) as left:
        main([*arguments, "--data", str(desk.data)])
    assert left.value.code == 130 and f"stopped; {said}" in capsys.readouterr().err
    assert len(desk.dispatch.orders(desk.device_id).fetch) == 1


def test_ctrl_c_cancels_the_runs_of_run(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    interrupt_at_first_wait(monkeypatch)
    with pytest.raises(SystemExit) as left:
        queue_cli.run_by_name(desk.dispatch, desk.subject, "pi5", {}, Console(quiet=True))
    assert left.value.code == 130 and "stopped; the runs are cancelled" in capsys.readouterr().err
    assert [run.status for run in desk.dispatch.runs()] == ["cancelled"]


def test_a_command_that_has_nothing_to_say_about_ctrl_c_is_spoken_for(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Dispatch, "targets", interrupted)
    assert main(["artifacts", "--data", str(desk.data)]) == 130
    assert "stopped; what was finished is kept" in capsys.readouterr().err


def interrupt_at_first_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(queue_cli, "time", SimpleNamespace(sleep=interrupted))


def test_a_roll_out_that_is_not_there_is_an_error(desk: Desk, capsys: pytest.CaptureFixture[str]):
    assert main(["rollout", "--name", "nosuch", "--data", str(desk.data)]) == 1
    assert "there is no roll-out 'nosuch'" in capsys.readouterr().err


def test_a_queue_says_what_is_run_and_a_sweep_is_cancelled_by_its_name(desk: Desk, capsys: pytest.CaptureFixture[str]):
    spec = RunSpec(
        run_id="r", artifact_id=desk.subject.artifact_id, pack_id=desk.subject.packs["arc_challenge"], limit=3
    )
    desk.dispatch.queue(desk.device_id, spec, desk.subject.manifest, "arc_challenge", sweep="night")
    at = ["--data", str(desk.data)]
    shutil.rmtree(desk.data / "shelf")  # the shelf may be storage that is away, or have lost the model since
    assert main(["runs", "--json", *at]) == 0
    assert [run["sweep"] for run in json.loads(capsys.readouterr().out)] == ["night"]
    assert main(["runs", *at]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "tiny" in shown and "arc_challenge" in shown and "first 3" in shown
    assert main(["sweep", "--name", "nosuch", "--cancel", *at]) == 1
    assert main(["sweep", "--name", "night", *at]) == 1 and "which models?" in capsys.readouterr().err
    assert main(["sweep", "--name", "night", "--cancel", *at]) == 0
    assert [run.status for run in desk.dispatch.runs()] == ["cancelled"]


def test_what_a_group_holds_is_shown_and_removed_on_all_its_boards(desk: Desk, capsys: pytest.CaptureFixture[str]):
    registry = Registry(database_url(desk.data, None), identity.read(identity_folder(desk.data)).fingerprint)
    boards = {"pi5": desk.device_id}
    for name in ("nano", "other"):
        board = Board(name)
        registry.enrol(board.enrolment(registry.issue_key("device", "test", approved=True)), "192.0.2.6")
        boards[name] = board.device_id
    registry.close()
    desk.dispatch.group("lab", [boards["pi5"], boards["nano"]])
    for device_id in boards.values():
        desk.dispatch.push(device_id, desk.subject.manifest)
    at = ["--data", str(desk.data)]
    assert main(["artifacts", "--device", "lab", "--json", *at]) == 0
    assert {target["device"] for target in json.loads(capsys.readouterr().out)} == {"pi5", "nano"}
    assert main(["artifacts", "--device", "lab", "--model", "tiny", "--forget", *at]) == 0
    assert {target.device: target.state for target in desk.dispatch.targets()} == {"other": "pending"}
    assert main(["artifacts", "--device", "lab", "--model", "tiny", "--forget", *at]) == 1
    assert "on none of these boards" in capsys.readouterr().err
