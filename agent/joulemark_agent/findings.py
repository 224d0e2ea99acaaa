"""One answer of the doctor or of a profile's check, and how it is written down. Not aware of what was asked or of how it is shown."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

Status = Literal["ok", "warning", "problem", "unknown"]


@dataclass(frozen=True)
class Finding:
    """One answer. `fix` is what to do about it, empty where there is nothing to do."""

    area: str
    status: Status
    text: str
    fix: str = ""


def to_json(findings: Sequence[Finding]) -> str:
    """The findings as an indented JSON array of objects."""
    return json.dumps([asdict(finding) for finding in findings], indent=2, ensure_ascii=False)


def in_units(size: int) -> str:
    """Bytes as people read them."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"
