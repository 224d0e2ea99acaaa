"""The most memory that this process has had resident, in bytes.

From VmHWM in /proc/self/status, which begins anew with a program. `ru_maxrss` does not: a child begins with what its parent had when it was
started, so that a small engine started by a large exporter would look large (kernel/exec: setmax_mm_hiwater_rss)."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

STATUS = Path("/proc/self/status")


def peak_bytes() -> int:
    """See the module. Where there is no /proc (macOS), what the system counts."""
    if STATUS.is_file():
        for line in STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    counted = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return counted if sys.platform == "darwin" else counted * 1024
