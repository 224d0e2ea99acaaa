"""The agent by itself: its folder in an empty place, everything heavy banned, every module imported, one whole run done."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from tests.fixtures.small_world import make_files, make_spec

ROOT = Path(__file__).resolve().parents[2]

# Runs in a fresh interpreter that sees only the copy. Engines may be imported by the worker alone; the fake needs none.
PROGRAM = """
import importlib, importlib.abc, json, pkgutil, sys, time
from pathlib import Path

BANNED = {"torch", "transformers", "datasets", "onnx", "gguf", "llama_cpp", "onnxruntime", "joulemark_host", "joulemark_exporter"}

class Ban(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in BANNED:
            raise ImportError(f"{name} is banned here")

sys.meta_path.insert(0, Ban())
import joulemark, joulemark_agent
assert Path(joulemark_agent.__file__).is_relative_to(Path.cwd()), joulemark_agent.__file__
modules = [
    module.name
    for package in (joulemark, joulemark_agent)
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + ".")
    if not module.name.endswith("__main__")
]
for name in modules:
    importlib.import_module(name)

from joulemark import artifact, packs
from joulemark.wire import Absent, RunSpec, content_id
from joulemark_agent import local_run
from joulemark_agent.sysfs import Roots

model, pack, spec = Path(sys.argv[1]), Path(sys.argv[2]), RunSpec.model_validate_json(sys.argv[3])
manifest = artifact.describe(model)
files = local_run.LocalFiles(model, content_id(manifest), manifest, {spec.pack_id: pack})
machine = local_run.local_machine(Roots(), "alone", "alone", None, None)
records = local_run.evaluate(files, spec, machine, Path("output"), lambda state, task: None)
print(json.dumps({"modules": len(modules), "status": records[0].status, "items": len(records[0].items)}))
"""


def test_the_agent_runs_by_itself(tmp_path: Path) -> None:
    alone = tmp_path / "alone"
    shutil.copytree(ROOT / "agent", alone, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "device_profiles", alone / "joulemark_agent" / "device_profiles")
    files = make_files(tmp_path / "files", 8)
    spec = make_spec(files)
    # Only the copy and the installed libraries: an editable install of the checkout must not be found first.
    environment = {**os.environ, "PYTHONPATH": str(alone)}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(files.model), str(files.packs[spec.pack_id]), spec.model_dump_json()],
        cwd=alone,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["status"] == "done" and result["items"] == 8
    assert result["modules"] > 60
