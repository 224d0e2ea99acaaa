"""Recipes: what is understood, and how a slip of the pen is answered."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from joulemark.errors import BadInput, NotFound
from joulemark_exporter import recipe
from joulemark_exporter.quantizers import gptq, lobi

WHOLE = """
name = "small"
licence = "apache-2.0"

[quantizer]
use = "gptq"
bits = 4
group_size = 64
damping = 0.02

[[adapters]]
path = "adapters/one"

[[adapters]]
path = "adapters/two"
scale = 2

[calibration]
dataset = "stories"
samples = 4

[probe]
windows = 2

[limits]
divergence = 1
"""


def test_everything_is_taken_over() -> None:
    found = recipe.parse(WHOLE)
    assert isinstance(found.quantizer, gptq.Options)
    assert (found.quantizer.group_size, found.quantizer.damping, found.quantizer.symmetric) == (64, 0.02, True)
    assert [(item.path, item.scale) for item in found.adapters] == [("adapters/one", 1.0), ("adapters/two", 2.0)]
    assert (found.calibration.dataset, found.calibration.samples, found.calibration.tokens) == ("stories", 4, 512)
    assert (found.writer_name, found.limits.divergence, found.probe.windows) == ("gguf", 1.0, 2)
    assert found.plain()["quantizer"]["group_size"] == 64


def test_lists_are_taken_over() -> None:
    found = recipe.parse('[quantizer]\nuse = "lobi"\nbits_per_weight = 5\ntypes = ["Q4_0", "F16"]')
    assert isinstance(found.quantizer, lobi.Options)
    assert found.quantizer.types == ("Q4_0", "F16")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[quantizer]\nuse = 'gptq'\ngroupsize = 32", r"unknown key 'groupsize'.*\n.*did you mean 'group_size'"),
        ("[quantiser]\nuse = 'gptq'", r"unknown key 'quantiser'.*\n.*did you mean 'quantizer'"),
        ("[quantizer]\nuse = 'gtpq'", r"no quantizer 'gtpq'.*\n.*did you mean 'gptq'"),
        ("[quantizer]\nuse = 'rtn'\nbits = 5", "bits"),
        ("[quantizer]\nuse = 'rtn'\nsymmetric = 1", "symmetric"),
        ("[quantizer]\nbits = 4", "does not say which quantizer"),
        ("[quantizer]\nuse = 'rtn'\n[calibration]\nsample = 3", "did you mean 'samples'"),
        ("[quantizer]\nuse = 'rtn'\n[limits]\ndivergence = -1", "divergence"),
        ("[quantizer]\nuse = 'rtn'\n[limits]\ndivergence = nan", "divergence"),
        ("[quantizer]\nuse = 'rtn'\n[writer]\nuse = 'gguff'", "did you mean 'gguf'"),
        ("[quantizer]\nuse = 'rtn'\n[[adapters]]\nscale = 1", "path"),
        ("adapters = 'x'\n[quantizer]\nuse = 'rtn'", "adapters must be tables"),
        ("[quantizer", "not TOML"),
        ("name = '../x'\n[quantizer]\nuse = 'rtn'", "name"),
    ],
)
def test_slips_are_answered_with_the_nearest_word(text: str, words: str) -> None:
    with pytest.raises(BadInput) as caught:
        recipe.parse(text)
    assert re.search(words, str(caught.value)), str(caught.value)


def test_files(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="no recipe"):
        recipe.read(tmp_path / "none.toml")
    (tmp_path / "large.toml").write_text("#" * (1 << 19))
    with pytest.raises(BadInput, match="larger than"):
        recipe.read(tmp_path / "large.toml")
    (tmp_path / "good.toml").write_text(WHOLE)
    assert recipe.read(tmp_path / "good.toml") == recipe.parse(WHOLE)
