"""deploy/Containerfile for x86: built from a checkout as its first lines say, then the agent in it."""

from __future__ import annotations

import json
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from joulemark.sources import default_cache
from tests.fixtures import containers
from tests.fixtures.needed_programs import require_root_and

pytestmark = pytest.mark.timeout(1700)
CHECKOUT = Path(__file__).resolve().parents[2]


def package_index(folder: Path) -> list[str]:
    """buildah's options that show it this machine's package index: one file with pip's settings, and what is named there."""
    listed = [sys.executable, "-m", "pip", "config", "list"]
    said = subprocess.run(listed, capture_output=True, text=True, check=True).stdout
    # The environment's come first, and count.
    settings = dict(reversed(re.findall(r"^\S*\.([a-z-]+)='(.*)'$", said, re.MULTILINE)))
    shown: dict[Path, str] = {}
    for name in re.findall(r"(?:file://)?(/[^\s']+)", f"{settings}"):
        path = Path(name)
        # An index of files has its pages in `simple`, which point to files beside it.
        shown.update(
            {known: str(known) for known in (path.parent if path.name == "simple" else path,) if known.exists()}
        )
    if certificate := settings.get("cert"):
        # Elsewhere: the image's own certificates are made where this one lies.
        settings["cert"] = shown[Path(certificate)] = "/tmp/index.crt"
    file = folder / "pip.conf"
    file.write_text("[global]\n" + "".join(f"{key} = {value}\n" for key, value in settings.items()))
    shown[file] = "/etc/pip.conf"
    return [word for here, there in shown.items() for word in ("--volume", f"{here}:{there}:ro")]


@pytest.mark.skipif(platform.machine() != "x86_64", reason="this is no x86 machine")
def test_the_agent_from_a_checkout(tmp_path: Path) -> None:
    containers.require()
    require_root_and({"mmdebstrap": "mmdebstrap", "setpriv": "util-linux"}, "no container images here")
    base = tmp_path / "base"
    subprocess.run(["mmdebstrap", "--quiet", "--variant=minbase", "bookworm", str(base)], check=True, timeout=600)
    context = tmp_path / "context"
    for name in subprocess.run(
        ["git", "ls-files"], cwd=CHECKOUT, capture_output=True, text=True, check=True
    ).stdout.split():
        (context / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(CHECKOUT / name, context / name)
    store = containers.Store(tmp_path / "store")
    store.add_base(base, "amd64")
    # The engine of this processor is taken from this machine's cache, so that it is not compiled once more.
    cache = ["--volume", f"{default_cache()}:/tmp/cache"]
    image = store.build(context, "agent", "amd64", [*package_index(tmp_path), *cache])
    facts = store.facts(image)
    assert (facts["architecture"], facts["config"]["User"]) == ("amd64", "10001:10001")
    with store.opened(image) as root:
        assert not list((root / "usr/bin").glob("*g++*")), "no compiler goes out with it"
        agent = ("/opt/joulemark/bin/joulemark", "agent", "--data", "/data")
        assert (*facts["config"]["Entrypoint"],) == agent
        done = inside(root, "/opt/joulemark/bin/joulemark", "doctor", "--json", "--data", "/data")
        assert done.stdout, done.stderr
        found = {finding["area"]: finding for finding in json.loads(done.stdout)}
        for engine in ("engine llama.cpp", "engine onnxruntime"):
            assert found[engine]["status"] == "ok", found[engine]
        ran = inside(root, "timeout", "15", *agent, "--listen", "127.0.0.1:0")
        assert ran.returncode == 124, ran.stderr
        assert "serves on" in ran.stderr
        assert (root / "data/identity").is_dir()


def inside(root: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """A command in the image, by its user."""
    for name in ("proc", "dev", "sys"):
        (root / name).mkdir(exist_ok=True)
    steps = [f"mount --rbind /{name} {root}/{name}" for name in ("proc", "dev", "sys")]
    nobody = "setpriv --reuid=10001 --regid=10001 --clear-groups"
    steps.append(f'exec env -i PATH=/opt/joulemark/bin:/usr/sbin:/usr/bin:/bin chroot {root} {nobody} "$@"')
    command = ["unshare", "-m", "sh", "-ec", "\n".join(steps), "sh", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
