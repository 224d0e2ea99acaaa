"""What was written by every version that there has been is still read, and says the same. A version's files are never changed."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from pydantic import BaseModel

from joulemark import protocol, statements, wire
from joulemark.wire import SCHEMA, canonical_json

GOLDEN = Path(__file__).parents[1] / "fixtures" / "golden" / "wire"
FILES = sorted(GOLDEN.glob("*/*.json"))
# sha256 over the names and contents of a version's files: whoever changes one changes what boards in the field have written.
SEALS = {"1": "4e9a8cbf02c4b3fcc99796b70b63f925bc8283cb62ecdeb301af6910337fe6a7"}


def model_of(name: str) -> type[BaseModel]:
    for module in (wire, protocol, statements):
        if hasattr(module, name):
            return getattr(module, name)
    raise AssertionError(f"what was called {name} is gone: boards in the field still send it")


def test_every_version_has_its_files_and_they_are_as_they_were():
    assert sorted(folder.name for folder in GOLDEN.iterdir()) == [str(number) for number in range(1, SCHEMA + 1)]
    for folder in GOLDEN.iterdir():
        digest = hashlib.sha256()
        for path in sorted(folder.iterdir()):
            digest.update(path.name.encode() + path.read_bytes())
        assert digest.hexdigest() == SEALS[folder.name], folder.name


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_what_an_older_version_wrote_is_read_and_loses_nothing(path: Path):
    read = model_of(path.stem).model_validate_json(path.read_bytes())
    before, now = json.loads(path.read_bytes()), read.model_dump(mode="json", by_alias=True)
    assert _kept(before, now), path


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_what_a_newer_version_adds_is_ignored(path: Path):
    model = model_of(path.stem)
    more = json.loads(path.read_bytes()) | {"something_new": {"deep": [1, 2, 3]}}
    assert canonical_json(model.model_validate_json(json.dumps(more))) == canonical_json(
        model.model_validate_json(path.read_bytes())
    )


def _kept(before: object, now: object) -> bool:
    """Whether everything of `before` is in `now`; more may have been added, with its default."""
    if isinstance(before, dict) and isinstance(now, dict):
        return all(key in now and _kept(value, now[key]) for key, value in before.items())
    if isinstance(before, list) and isinstance(now, list):
        return len(before) == len(now) and all(map(_kept, before, now))
    return before == now
