"""What an agent is told when it starts. Frozen; no file format, no reading of the environment: the command line fills it in."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from joulemark_agent.sysfs import Roots


@dataclass(frozen=True)
class Settings:
    """`data` is the folder that the agent owns. Without a host reports stay in the outbox and artifacts come by upload."""

    data: Path
    name: str
    host_url: str | None = None
    """An open host's address; an agent that enrolled knows its host."""
    open_to_all: bool = False
    """A trial on loopback: everybody on this machine may use the agent, and nothing has to be signed."""
    key_file: Path | None = None
    """A one-time enrolment key that is used, and removed, at the first start."""
    limit_rate: float | None = None
    """Bytes per second at which artifacts are fetched at most."""
    store_bytes: int | None = None
    """What artifacts may take on this board; None: what the disk holds."""
    announce: bool | None = None
    """Whether the local network is told that the agent is here; None: beyond loopback it is."""
    profile: str | None = None
    roots: Roots = field(default_factory=Roots)
    replay: Path | None = None
    """A recorded trace that is played back as a meter, for tests and demonstrations; its channels say so."""
    outbox_bytes: int = 256 * 1024 * 1024
    outbox_age_s: float = 90 * 86_400.0
    serve_idle_s: float = 300.0
    """An engine that serves completions is unloaded after so long without a request."""
