"""Plug-ins: a folder of modules where the module's name is the key. Adding a file adds a plug-in; no registry, no import of all.

Only `load` imports a plug-in, and only after its name was found in the folder listing, so a name from outside
can never reach anything else.
"""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from types import ModuleType

from joulemark.errors import NotFound


def names(package: str) -> tuple[str, ...]:
    """The plug-ins in `package` (a dotted name), sorted; private modules (leading underscore) are not plug-ins."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.submodule_search_locations is None:
        raise NotFound(f"there is no plug-in folder {package!r}", "this is a packaging fault: reinstall joulemark")
    found = {
        path.stem
        for folder in spec.submodule_search_locations
        for path in Path(folder).glob("*.py")
        if not path.stem.startswith("_")
    }
    return tuple(sorted(found))


def load(package: str, name: str) -> ModuleType:
    """The module `package.name`. Raises NotFound, naming the known ones, when there is no such file."""
    known = names(package)
    if name not in known:
        raise NotFound(f"unknown name {name!r} in {package}", f"known: {', '.join(known)}")
    return importlib.import_module(f"{package}.{name}")
