"""No engine reports to its maker: no device id, no queue of events on the disk, no thread that sends them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

onnx = pytest.importorskip("onnx", reason="onnx is not installed: make install-test")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: make install-test")
PROGRAM = """
import sys
{first}
import onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("Threads")))
"""


def threads_and_files(graph: Path, home: Path, first: str) -> tuple[int, list[str]]:
    """What a process has that loaded a graph, in a home folder of its own."""
    home.mkdir()
    # Continuous integration silences it too: that would hide what is looked for.
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in ("CI", "ORT_DISABLE_TELEMETRY", "XDG_CACHE_HOME")
    }
    command = [sys.executable, "-c", PROGRAM.format(first=first), str(graph)]
    done = subprocess.run(
        command, env={**kept, "HOME": str(home)}, capture_output=True, text=True, check=True, timeout=120
    )
    return int(done.stdout), [path.name for path in home.rglob("*") if path.is_file()]


def test_onnxruntime_reports_nothing_once_joulemark_is_imported(tmp_path: Path) -> None:
    made = onnx.parser.parse_model(
        '<ir_version: 9, opset_import: ["": 17]> same (float[1] x) => (float[1] y) { y = Identity(x) }'
    )
    graph = tmp_path / "graph.onnx"
    graph.write_bytes(made.SerializeToString())
    threads, files = threads_and_files(graph, tmp_path / "ours", "import joulemark")
    assert files == []
    # By itself it does: else this test could not fail, and the line in joulemark/__init__.py could go.
    more, left = threads_and_files(graph, tmp_path / "bare", "")
    assert "deviceid" in left and more > threads
