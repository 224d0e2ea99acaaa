"""The writer plug-in contract: one file a format, chosen by `use` in the recipe's [writer] (GGUF when there is none).

A writer module offers

    class Options(Settings)                          its keys in the recipe
    check(task, options, numbers) -> None            raises BadInput for what cannot be written, before anything is computed; `numbers` is
                                                     the kind that the quantizer will give
    write(task, choices, folder, options) -> Written the files in `folder`
    describe(task, choices, written) -> Manifest     what was written, without its origin
    tools(options) -> dict[str, str]                 the versions of the packages that decide about the result, by their names; raises
                                                     MissingExtra
    read_back(task, choices, written) -> dict        state_dict name → Weight: the weights that the engine computes with
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from joulemark.errors import MissingExtra


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
    exact: bool = False
    """Whether the engine computes with 32-bit floats throughout, so that its logits are the model's but for their last bits. llama.cpp does
    not: it looks GELU up in a table of 16-bit floats."""
    loaded_weight_bytes: int | None = None
    """What the weights take once they are loaded, where that is not what they take on disk."""


def versions(*packages: str) -> dict[str, str]:
    """What is installed here of these. Raises MissingExtra."""
    try:
        return {name: metadata.version(name) for name in packages}
    except metadata.PackageNotFoundError as error:
        raise MissingExtra(f"{error.name} is not installed", "make install-export") from error
