"""What the repository may hold: no data sets, no model weights, nothing large; and that the README names tests that exist."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LARGEST_BYTES = 512 * 1024


def test_no_data_set_and_no_weights_are_bundled() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: nothing is tracked here")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    tracked = [ROOT / name for name in listed.split("\0") if name]
    assert len(tracked) > 100
    large = [path.name for path in tracked if path.exists() and path.stat().st_size > LARGEST_BYTES]
    bundled = [
        path.name for path in tracked if path.name.endswith((".gguf", ".onnx", ".safetensors", ".pack.json", ".jsonl"))
    ]
    assert (large, bundled) == ([], [])


def test_every_test_that_the_readme_names_exists() -> None:
    readme = (ROOT / "README.md").read_text("utf-8")
    table = readme.split("## What happens when things go wrong", 1)[1].split("\n## ", 1)[0]
    named = set(re.findall(r"`(test_\w+)`", table))
    found = {
        name
        for path in (ROOT / "tests").rglob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", path.read_text("utf-8"), re.MULTILINE)
    }
    assert len(named) > 50 and sorted(named - found) == []
