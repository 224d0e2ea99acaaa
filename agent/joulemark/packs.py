"""Task packs: a task rendered once into final prompts, named by the sha256 of its canonical JSON, pushed like a model.

Owns rendering, lm-eval's task hash, the file form and the checks on reading. A pack file is exactly the canonical JSON
of the pack, so its id is also the sha256 of the file. What comes from outside is hostile: size is bounded before
reading, and only PackRejected (or NotFound) leaves `read`. It is not aware of engines or of how a pack travels.

Hashes as lm-eval 0.4.13 writes them, sha256 hex: prompt_hash of the prompt, target_hash of the target's text, doc_hash
of `json.dumps(doc, indent=2, ensure_ascii=False)`, task_hash of all three of every sample line in logged order.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

from joulemark import durable, plugins
from joulemark.documents import Documents
from joulemark.errors import NotFound, PackRejected
from joulemark.wire import SCHEMA, PackHeader, PackItem, TaskPack, canonical_json

TASKS = "joulemark.tasks"

MAX_PACK_BYTES = 128 << 20
MAX_PROMPT_CHARACTERS = 1 << 20
MAX_CHOICES = 256
MAX_STOPS = 64


def render(task: str, documents: Documents) -> TaskPack:
    """The pack of `task` over all `documents`. Raises NotFound for an unknown task or missing training rows."""
    module = plugins.load(TASKS, task)
    items = tuple(item.model_copy(update={"doc_sha256": _doc_sha256(item.doc)}) for item in module.render(documents))
    return TaskPack(
        task=task,
        version=module.VERSION,
        kind=module.KIND,
        dataset=documents.dataset,
        shots=module.SHOTS,
        generation=module.GENERATION,
        task_hash=task_hash(items, len(module.FILTERS)),
        items=items,
    )


def header(pack: TaskPack, pack_id: str) -> PackHeader:
    """What a record keeps of a pack."""
    return PackHeader(
        pack_id=pack_id,
        task=pack.task,
        version=pack.version,
        kind=pack.kind,
        dataset=pack.dataset,
        shots=pack.shots,
        apply_chat_template=pack.apply_chat_template,
        task_hash=pack.task_hash,
        size=len(pack.items),
    )


def task_module(pack: TaskPack | PackHeader) -> ModuleType:
    """The task's own module, for grading. Raises NotFound for an unknown task, PackRejected for another version of
    it."""
    module = plugins.load(TASKS, pack.task)
    if (pack.version, pack.kind) != (module.VERSION, module.KIND):
        raise PackRejected(
            f"the pack holds {pack.task} {pack.version} ({pack.kind}), "
            f"this installation grades {module.VERSION} ({module.KIND})",
            "render the pack again with the same version of joulemark",
        )
    return module


def text_sha256(text: str) -> str:
    """sha256 (hex) of the UTF-8 text: lm-eval's `hash_string`."""
    return hashlib.sha256(text.encode()).hexdigest()


def prompt_sha256(item: PackItem) -> str:
    """lm-eval's prompt_hash."""
    return text_sha256(item.prompt)


def target_sha256(item: PackItem) -> str:
    """lm-eval's target_hash."""
    return text_sha256(item.target)


def doc_sha256(item: PackItem) -> str:
    """lm-eval's doc_hash: the one noted when the pack was rendered, else that of the document as it stands."""
    return item.doc_sha256 if item.doc_sha256 is not None else _doc_sha256(item.doc)


def _doc_sha256(doc: dict[str, Any]) -> str:
    return text_sha256(json.dumps(doc, indent=2, ensure_ascii=False))


def task_hash(items: Iterable[PackItem], filters: int) -> str:
    """lm-eval's task_hash when every filter logs every item, in this order."""
    lines = "".join(doc_sha256(item) + prompt_sha256(item) + target_sha256(item) for item in items)
    return text_sha256(lines * filters)


def write(pack: TaskPack, path: Path) -> str:
    """Writes the canonical JSON (temporary name, fsync, rename) and returns the pack's id."""
    data = canonical_json(pack)
    durable.replace_file(path, [data])
    return hashlib.sha256(data).hexdigest()


def read(path: Path, expected_id: str | None = None) -> TaskPack:
    """The pack in file `path`, checked throughout. Raises NotFound when there is no such file, else PackRejected."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_PACK_BYTES + 1)
    except FileNotFoundError as error:
        raise NotFound(f"there is no task pack at {path}", "push the pack first") from error
    except OSError as error:
        raise PackRejected(
            f"cannot read the task pack {path}: {error}", "check the file and its permissions"
        ) from error
    return parse(data, expected_id)


def parse(data: bytes, expected_id: str | None = None) -> TaskPack:
    """The pack in `data`, the canonical JSON of a pack. Raises PackRejected."""
    if len(data) > MAX_PACK_BYTES:
        raise _rejected(f"it is larger than {MAX_PACK_BYTES} bytes", "split the task into smaller packs")
    found = hashlib.sha256(data).hexdigest()
    if expected_id is not None and found != expected_id:
        raise _rejected(f"its sha256 is {found}, expected {expected_id}", "push the pack again")
    try:
        pack = TaskPack.model_validate_json(data)
        # A field that this version would drop may change what is asked: the numbers would not be the pack's.
        canonical = canonical_json(pack) == data
    except (ValueError, RecursionError) as error:  # pydantic's errors and bad Unicode are ValueErrors
        raise _rejected(f"it cannot be read: {_first_line(error)}") from error
    if not canonical:
        raise _rejected("it is not the canonical JSON of a pack, or it has fields that this version does not know")
    _check(pack)
    return pack


def _check(pack: TaskPack) -> None:
    if pack.schema_number != SCHEMA:
        raise _rejected(f"its schema is {pack.schema_number}, this version reads {SCHEMA}")
    seen: set[int] = set()
    for item in pack.items:
        if item.doc_id in seen:
            raise _rejected(f"document {item.doc_id} occurs twice")
        seen.add(item.doc_id)
        if not 0 < len(item.prompt) <= MAX_PROMPT_CHARACTERS:
            raise _rejected(f"document {item.doc_id} has a prompt of {len(item.prompt)} characters")
        _check_choices(pack, item)
    _check_generation(pack)
    if pack.task in plugins.names(TASKS):
        _check_task_hash(pack)


def _check_choices(pack: TaskPack, item: PackItem) -> None:
    if pack.kind == "generation":
        if item.choices:
            raise _rejected(f"document {item.doc_id} of a generation task has choices")
        return
    if not 2 <= len(item.choices) <= MAX_CHOICES:
        raise _rejected(f"document {item.doc_id} has {len(item.choices)} choices, allowed are 2 to {MAX_CHOICES}")
    if not all(item.choices):
        raise _rejected(f"document {item.doc_id} has an empty choice")
    if item.target not in {str(index) for index in range(len(item.choices))}:
        raise _rejected(f"document {item.doc_id} has the target {item.target[:20]!r}, which is no index of a choice")


def _check_generation(pack: TaskPack) -> None:
    if (pack.generation is None) != (pack.kind == "choice"):
        raise _rejected(f"a {pack.kind} task {'lacks' if pack.generation is None else 'has'} generation settings")
    stops = pack.generation.stop if pack.generation else ()
    if len(stops) > MAX_STOPS or not all(stops):
        raise _rejected("its stop strings are too many, or one is empty")


def _check_task_hash(pack: TaskPack) -> None:
    """Comparability rests on the task hash, so a known task's is computed again. An unknown task cannot be graded
    here."""
    found = task_hash(pack.items, len(plugins.load(TASKS, pack.task).FILTERS))
    if found != pack.task_hash:
        raise _rejected(f"its task hash is {pack.task_hash}, its items give {found}")


def _rejected(reason: str, hint: str = "render the pack again and push it again") -> PackRejected:
    return PackRejected(f"the task pack is rejected: {reason}", hint)


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines() or [type(error).__name__]
    return " ".join(line.strip() for line in lines[:3])[:300]
