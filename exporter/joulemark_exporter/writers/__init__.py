"""The writer plug-in contract: one file a format, chosen by `use` in the recipe's [writer] (GGUF when there is none).

A writer module offers

    class Options(Settings)                          its keys in the recipe
    check(task, options, form) -> None               raises BadInput for what cannot be written, before anything is computed; `form` is what
                                                     integers the quantizer will give, None where it gives none
    write(task, choices, folder, options) -> Written the files in `folder`
    describe(task, choices, written) -> Manifest     what was written, without its origin
    tools(options) -> tuple[str, ...]                the packages whose versions decide about the result
    read_back(task, choices, written) -> dict        state_dict name → Weight: the weights that the engine computes with
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Written:
    """`files` in the order in which a board opens them: the first is the one that its engine is given."""

    files: tuple[Path, ...]
    engine: str
    """The plug-in of `engines` that opens it."""
    sha256: str | None = None
    """Of the first file, taken from the bytes on their way to the disk; None where another program wrote it."""
    memory_number_bytes: int = 2
    """Bytes of a number in the engine's key-value memory."""
    resident_bytes: int | None = None
    """What the weights take once they are loaded, where that is not what they take on disk."""
