"""Where the files lie that are brought onto boards: install script, service unit, udev rules, the engine's build options."""

from __future__ import annotations

from pathlib import Path

from joulemark.errors import NotFound

SERVICE_FILES = (
    "joulemark-agent.service", "joulemark-power-mode.socket", "joulemark-power-mode@.service", "privileges.sh", "99-joulemark.rules",
)  # fmt: skip
"""What deploy/install.sh wants of a release, or beside it."""
_HERE = Path(__file__).resolve().parent


def deploy_file(name: str) -> Path:
    """A file of deploy/: inside the installed package, or beside it in a checkout. Raises NotFound."""
    for folder in (_HERE / "board_files", _HERE.parent):
        if (folder / name).is_file():
            return folder / name
    raise NotFound(f"the file {name} is missing", "this is a packaging fault: reinstall joulemark")


def checkout() -> Path | None:
    """The top of the checkout that this runs from, None in an installed package."""
    top = _HERE.parent.parent
    return top if (top / "pyproject.toml").is_file() and (top / "agent").is_dir() else None
