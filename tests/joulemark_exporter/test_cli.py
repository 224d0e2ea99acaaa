"""The command as people type it: its help, its output, its errors, and what it says where parts are missing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from joulemark import artifact
from tests.fixtures import hub_models
from tests.fixtures.exporting import CALIBRATION, train


def run(
    *words: str | Path, code: str = "", verb: str = "export", **environment: str
) -> subprocess.CompletedProcess[str]:
    start = (
        ["-c", f"{code}\nimport sys\nfrom joulemark.__main__ import main\nsys.exit(main())"]
        if code
        else ["-m", "joulemark"]
    )
    command = [sys.executable, *start, verb, *map(str, words)]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "COLUMNS": "100", **environment}
    )


@pytest.fixture
def base(tmp_path: Path) -> Path:
    hub_models.write(tmp_path / "base", "llama")
    (tmp_path / "recipe.toml").write_text(f"name = 'tiny'\n[quantizer]\nuse = 'rtn'\n{CALIBRATION}")
    return tmp_path


def test_the_help_shows_a_recipe_that_works(base: Path) -> None:
    shown = run("--help")
    assert shown.returncode == 0
    lines = shown.stdout.split("An example of a recipe:")[1].splitlines()
    text = "\n".join(line.strip() for line in lines)
    assert "[quantizer]" in text
    from joulemark_exporter import recipe

    assert recipe.parse(text).calibration.samples == 128


def test_what_people_and_programs_are_shown(base: Path) -> None:
    train(base / "base", base / "adapter", "llama")
    words = (
        base / "base",
        "--recipe",
        base / "recipe.toml",
        "--adapter",
        f"{base / 'adapter'}=0.5",
        "--out",
        base / "out",
    )
    shown = run(*words)
    assert shown.returncode == 0, shown.stderr
    manifest = artifact.verify(base / "out")
    assert f"{manifest.weight_bytes:,}" in shown.stdout
    assert f"{manifest.bits_per_weight:.2f}" in shown.stdout
    assert manifest.origin is not None
    assert manifest.origin.steps[1].name == "adapter adapter × 0.5"
    again = run(*words, "--json")
    told = json.loads(again.stdout)
    assert told["weight_bytes"] == manifest.weight_bytes
    assert told["probe"]["tokens"] == 48
    assert again.stderr == ""


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nowhere", "--recipe", "recipe.toml"], "there is no model at"),
        (["base", "--recipe", "none.toml"], "there is no recipe at"),
        (["base", "--recipe", "recipe.toml", "--adapter", "base=x"], "is not a number"),
        (["base", "--recipe", "recipe.toml", "--adapter", "base"], "adapter_config.json"),
        (["recipe.toml", "--recipe", "recipe.toml"], "neither a folder nor a .gguf file"),
    ],
)
def test_errors_are_words_with_a_next_step(words: list[str], said: str, base: Path) -> None:
    given = [
        str(base / word) if word in ("base", "recipe.toml", "none.toml") else word.replace("base", str(base / "base"))
        for word in words
    ]
    shown = run(*given, "--out", base / "out")
    assert shown.returncode == 1
    assert said in shown.stderr
    assert "hint:" in shown.stderr
    assert "Traceback" not in shown.stderr
    assert not (base / "out").exists()


def test_a_missing_part_is_named_with_the_way_to_get_it(base: Path) -> None:
    without = "import sys\nsys.modules['safetensors'] = None"
    shown = run(base / "base", "--recipe", base / "recipe.toml", code=without)
    assert shown.returncode == 1
    assert "not installed" in shown.stderr
    assert "make install-export" in shown.stderr
    assert "Traceback" not in shown.stderr


def test_a_hub_id_without_a_hub(base: Path) -> None:
    shown = run(
        "owner/name",
        "--recipe",
        base / "recipe.toml",
        "--out",
        base / "out",
        HF_HUB_OFFLINE="1",
        JOULEMARK_CACHE=str(base / "cache"),
    )
    assert shown.returncode == 1
    assert "could not be fetched" in shown.stderr
    assert "Traceback" not in shown.stderr


def test_an_adapter_of_its_own(base: Path) -> None:
    train(base / "base", base / "adapter", "llama")
    words = (base / "adapter", "--base", base / "base", "--out", base / "adapter.gguf")
    shown = run(*words, verb="adapter")
    assert shown.returncode == 0 and "21 matrices" in shown.stdout, shown.stderr
    assert (base / "adapter.gguf").read_bytes()[:4] == b"GGUF"
    again = run(*words, verb="adapter")
    assert again.returncode == 1 and "exists" in again.stderr
    hub_models.write(base / "other", "llama", hidden_size=128)
    wrong = run(base / "adapter", "--base", base / "other", "--out", base / "wrong.gguf", verb="adapter")
    assert wrong.returncode == 1 and "another base model" in wrong.stderr, wrong.stderr
    assert not list(base.glob("*wrong*"))


def test_the_same_model_for_other_tools(base: Path) -> None:
    words = (
        base / "base",
        "--recipe",
        base / "recipe.toml",
        "--out",
        base / "out",
        "--checkpoint",
        base / "checkpoint",
    )
    shown = run(*words)
    assert shown.returncode == 0, shown.stderr
    config = json.loads((base / "checkpoint" / "config.json").read_bytes())
    assert config["quantization_config"]["bits"] == 4
    again = run(*words)
    assert again.returncode == 1 and "exists" in again.stderr
    # And back: its integers go into an artifact as they are, in either format.
    for number, more in enumerate(("", "[writer]\nuse = 'onnx'\nprecision = 'int4'\naccuracy_level = 1\n")):
        text = f"[quantizer]\nuse = 'none'\nembedding = 'Q8_0'\n{CALIBRATION}{more}"
        (base / "keep.toml").write_text(text)
        kept = run(base / "checkpoint", "--recipe", base / "keep.toml", "--out", base / f"kept{number}", "--json")
        assert kept.returncode == 0, kept.stderr
        assert json.loads(kept.stdout)["findings"]["divergence"] < 1e-3
        assert artifact.verify(base / f"kept{number}").quantization == "GPTQ-4-g32"
