"""The commands: output, exit status, messages with a next step; and the server's address rules."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from joulemark.__main__ import run as run_command
from joulemark.errors import BadInput, Conflict, EngineFailed
from joulemark_host import cli, fleet_cli
from joulemark_host.processes import Child
from joulemark_host.records import Records
from joulemark_host.server import LOOPBACK_NAMES, bind, names_of
from tests.fixtures.gguf_files import llama, whole
from tests.fixtures.records import make_device, make_record, record_bytes


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    records = Records(f"sqlite:///{folder / 'records.db'}")
    device = make_device(name="\x1b[31mred\x1b[0m [bold]board")
    records.put(record_bytes(make_record("run-1", device=device)))
    records.put(record_bytes(make_record("run-2", task="gsm8k_cot", status="failed")))
    records.close()
    return folder


def test_records_as_table_and_json(data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert run_command(cli.app, ["records", "--data", str(data)]) == 0
    shown = capsys.readouterr().out
    assert "run-1" in shown
    assert "40.0 %" in shown
    assert "failed" in shown
    assert "\x1b[31m" not in shown  # a board's name cannot colour the terminal
    assert "[bold]board" in shown  # and is not markup
    assert run_command(cli.app, ["records", "--data", str(data), "--task", "gsm8k_cot", "--json"]) == 0
    (run,) = json.loads(capsys.readouterr().out)
    assert (run["run_id"], run["status"], run["problem"]["code"]) == ("run-2", "failed", "engine_failed")


def test_heatmap_writes_page_and_picture(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    page, png = tmp_path / "h.html", tmp_path / "h.png"
    arguments = ["heatmap", "--metric", "accuracy", "--data", str(data), "-o", str(page), "--png", str(png)]
    assert run_command(cli.app, arguments) == 0
    assert page.read_text().count('<section class="figure"') == 2
    assert png.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    database = str(data / "records.db")
    assert (
        run_command(
            cli.app,
            ["heatmap", "--metric", "accuracy", "--task", "arc_challenge", "--database", database, "-o", str(page)],
        )
        == 0
    )
    assert page.read_text().count('<section class="figure"') == 1
    capsys.readouterr()
    for wrong, says in ((["--metric", "speed"], "decode_rate"), (["--task", "mmlu"], "arc_challenge, gsm8k_cot")):
        assert run_command(cli.app, ["heatmap", *wrong, "--data", str(data), "-o", str(page)]) == 1
        assert says in capsys.readouterr().err


def test_errors_have_a_next_step_and_a_status(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    tiny = tmp_path / "tiny.gguf"
    tiny.write_bytes(whole(llama()))
    for arguments, status, says in (
        (["heatmap", "--data", str(tmp_path)], 1, "joulemark run"),
        (["run", "nothing.gguf", "--data", str(tmp_path)], 1, "check the path"),
        (["run", "x", "--task", "nonsense", "--data", str(tmp_path)], 1, "known: arc_challenge"),
        (["push", str(tiny), "--to", "pi5.local", "--data", str(tmp_path)], 1, "host init"),
        (["records", "--database", "what://x"], 1, "sqlite:///"),
        (["heatmap", "--no-such-option"], 2, "--no-such-option"),
        (["run"], 2, "model"),
        (["run", "x", "--limit", "0"], 2, "--limit"),
    ):
        assert run_command(cli.app, arguments) == status, arguments
        shown = capsys.readouterr()
        assert says in shown.err + shown.out, arguments
        assert "Traceback" not in shown.err


def test_a_published_model_is_named_and_pushing_to_nobody_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    model = tmp_path / "tiny.gguf"
    model.write_bytes(whole(llama()))
    assert run_command(cli.app, ["publish", str(model), "--name", "tiny", "--data", str(tmp_path / "d"), "--json"]) == 0
    published = json.loads(capsys.readouterr().out)
    assert len(published[str(model)]) == 64
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{closed.getsockname()[1]}"
        assert run_command(cli.app, ["push", "tiny", "--to", address, "--data", str(tmp_path / "d")]) == 1
    assert "joulemark agent" in capsys.readouterr().err
    (tmp_path / "d" / "shelf").rename(tmp_path / "moved")
    (tmp_path / "d" / "shelf").write_text("a file in the way")
    assert run_command(cli.app, ["publish", str(model), "--data", str(tmp_path / "d")]) == 1
    assert "Traceback" not in capsys.readouterr().err


def test_a_host_says_what_it_lacks(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    data = ["--data", str(tmp_path / "d")]
    for arguments, says in (
        (["host"], "host init"),
        (["host", "--open", "--listen", "0.0.0.0:0"], "lets anybody in"),
        (["host", "--open", "--listen", "nonsense"], "127.0.0.1:8080"),
        (["host", "token"], "host init"),
        (["devices"], "host init"),
        (["devices", "approve", "pi5"], "host init"),
    ):
        for place in {1, len(arguments)}:  # before a sub-command and after it
            assert run_command(fleet_cli.app, [*arguments[:place], *data, *arguments[place:]]) == 1, arguments
            shown = capsys.readouterr()
            assert says in shown.err and "Traceback" not in shown.err, arguments
    assert not (tmp_path / "d").exists()


@pytest.mark.parametrize(
    ("missing", "arguments", "says"),
    [
        ("cryptography", ["host", "init"], "pip install cryptography"),
        ("nacl", ["host", "init"], "joulemark[agent]"),
        ("nacl", ["agent", "--open", "--listen", "127.0.0.1:0"], "joulemark[agent]"),
        ("sqlalchemy", ["records"], "pip install sqlalchemy"),
    ],
)
def test_a_part_that_is_not_installed_is_said_and_nothing_is_left(
    tmp_path: Path, missing: str, arguments: list[str], says: str
):
    code = (
        "import sys\n"
        f"sys.modules[{missing!r}] = None\n"
        "from joulemark.__main__ import main\n"
        f"sys.exit(main({[*arguments, '--data', str(tmp_path / 'd')]!r}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1 and "Traceback" not in done.stderr and says in done.stderr, done.stderr
    assert not (tmp_path / "d" / "identity" / "signing.key").exists()


def test_a_port_in_use_is_one_clear_line_and_changes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with bind("127.0.0.1:0", False) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        with pytest.raises(Conflict, match="in use"):
            bind(address, False)
        assert run_command(fleet_cli.app, ["host", "--open", "--listen", address, "--data", str(tmp_path / "new")]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"joulemark: cannot listen on {address}: Address already in use\n  hint: ")
    assert not (tmp_path / "new").exists()


def test_only_loopback_is_served_without_being_told_otherwise():
    for address in ("0.0.0.0:0", "[::]:0", "203.0.113.1:80"):
        with pytest.raises(BadInput, match="lets anybody in"):
            bind(address, False)
    with pytest.raises(Conflict, match="cannot listen"):  # allowed, but nobody's address (RFC 5737)
        bind("203.0.113.1:80", True)
    assert names_of("0.0.0.0") == names_of("203.0.113.1") == ("*",)
    assert names_of("127.0.0.1") == names_of("::1") == LOOPBACK_NAMES
    for address in ("localhost:99999", "127.0.0.1:-1", "127.0.0.1", ""):
        with pytest.raises(BadInput):
            bind(address, False)


def test_help_names_every_command_and_is_quick_to_import():
    code = (
        "import sys, joulemark_host.cli, joulemark_host.fleet_cli; "
        "heavy = {'fastapi', 'sqlalchemy', 'vl_convert', 'uvicorn', 'cryptography'}; "
        "print(sorted(heavy & set(sys.modules)))"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"
    assert run_command(cli.app, ["--help"]) == 0


def test_a_child_that_ends_says_what_its_log_said_and_one_that_runs_is_stopped(tmp_path: Path):
    with Child("agent", ["no-such-command"], tmp_path / "a.log") as child:
        child._process.wait(30)  # pyright: ignore[reportPrivateUsage]
        with pytest.raises(EngineFailed, match="no-such-command"):
            child.check()
    with Child("host", ["host", "--listen", "127.0.0.1:0", "--data", str(tmp_path)], tmp_path / "h.log") as child:
        child.check()
        process = child._process  # pyright: ignore[reportPrivateUsage]
    assert process.poll() is not None


def children_with(argument: str) -> list[str]:
    """Command lines of the running `python -m joulemark …` that name `argument`."""
    found: list[str] = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().decode(errors="replace").replace("\0", " ")
        except OSError:  # it ended meanwhile
            continue
        if argument in words and " -m joulemark " in words:
            found.append(words)
    return found


def test_a_terminated_demonstration_stops_what_it_started(tmp_path: Path):
    """The real command as a process: SIGTERM while its servers run; nothing stays behind."""
    code = (
        "import sys; from joulemark.__main__ import run; from joulemark_host import cli, demo\n"
        "def wait(*a): print('ready', flush=True); import time; time.sleep(60)\n"
        "demo._publish = lambda *a: None; demo.push = wait\n"
        f"sys.exit(run(cli.app, ['demo', '--keep', {str(tmp_path)!r}, '--out', {str(tmp_path)!r}]))"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        lines = iter(process.stdout.readline, "")
        for line in lines:
            if line == "ready\n":
                break
        assert len(children_with(str(tmp_path))) == 2
        process.terminate()
        assert process.wait(60) == 130
    assert children_with(str(tmp_path)) == []
