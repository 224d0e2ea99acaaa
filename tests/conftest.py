"""Rules for all tests: they bind to loopback only, and in CI a skipped test is a failure unless its reason is expected."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fixtures import object_storage, postgresql

# What a clean machine with this repository alone cannot have, or CI as root cannot show. Everything else must run in CI.
EXPECTED_SKIPS = ("training rows", "../shared", "root writes everywhere")


def pytest_configure(config: pytest.Config) -> None:
    # A model that cannot be had must be an error in a test, never a silent download.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[postgresql.PostgresServer]:
    server = postgresql.PostgresServer(postgresql.programs())
    yield server
    server.close()


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of an empty database, of each kind that a host can use."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'records.db'}"
    return request.getfixturevalue("postgres_server").new_database()


@pytest.fixture(scope="session")
def object_server() -> Iterator[object_storage.ObjectServer]:
    server = object_storage.ObjectServer()
    yield server
    server.close()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    skipped = terminalreporter.stats.get("skipped", [])
    if skipped:
        terminalreporter.write_line(f"{len(skipped)} tests were skipped; each says why above")


def pytest_sessionfinish(session: pytest.Session) -> None:
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if not os.environ.get("JOULEMARK_NO_SKIPS") or reporter is None:
        return
    skipped = reporter.stats.get("skipped", [])
    reasons = [
        str(report.longrepr[2]) if isinstance(report.longrepr, tuple) else str(report.longrepr) for report in skipped
    ]
    unexpected = [reason for reason in reasons if not any(expected in reason for expected in EXPECTED_SKIPS)]
    if unexpected:
        reporter.write_line("skipped without an expected reason: " + "; ".join(sorted(set(unexpected))), red=True)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.fixture(scope="session")
def namespace() -> tuple[str, ...]:
    """How to get a mount namespace of one's own here: as anybody with a user namespace, else as root without one."""
    for flags in ("-rm", "-m"):
        if subprocess.run(["unshare", flags, "true"], capture_output=True, check=False).returncode == 0:
            return ("unshare", flags)
    pytest.skip("this kernel lets nobody mount in a namespace of its own: sysctl kernel.unprivileged_userns_clone=1")
