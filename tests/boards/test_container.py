"""deploy/Containerfile for boards: the image that a workstation makes of a release, without running anything of the board's."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fixtures import containers
from tests.fixtures.arm64 import Userland

pytestmark = pytest.mark.timeout(1700)


def test_a_release_in_a_container(userland: Userland, packed: Path, tmp_path: Path) -> None:
    containers.require()
    store = containers.Store(tmp_path / "store")
    store.add_base(userland.root, "arm64")
    context = tmp_path / "context"
    context.mkdir()
    (context / "joulemark-release.tar.gz").hardlink_to(packed)
    image = store.build(context, "release", "arm64")
    facts = store.facts(image)
    assert (facts["architecture"], facts["config"]["User"]) == ("arm64", "10001:10001")
    assert facts["config"]["Entrypoint"] == ["/opt/joulemark/bin/joulemark", "agent", "--data", "/data"]
    assert facts["config"]["Volumes"] == {"/data": {}}
    with store.opened(image) as root:
        assert (root / "data").stat().st_uid == 10001
        inside = Userland.__new__(Userland)
        inside.root = root
        for name in ("proc", "dev"):
            (root / name).mkdir(exist_ok=True)
        nobody = ("setpriv", "--reuid=10001", "--regid=10001", "--clear-groups")
        done = inside.run(*nobody, "/opt/joulemark/bin/joulemark", "--version")
        assert done.stdout.startswith("joulemark "), done.stderr
        # The agent serves until it is told to end: engine, folders and rights are right.
        words = (*facts["config"]["Entrypoint"], "--listen", "127.0.0.1:0")
        ran = inside.run(*nobody, "timeout", "30", *words)
        assert ran.returncode == 124, ran.stderr
        assert "serves on" in ran.stderr
        assert (root / "data/identity").is_dir()
