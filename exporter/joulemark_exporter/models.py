"""Finds the model that a person means: a Hugging Face folder, a GGUF file, or a hub id where the machine is connected.

Owns only the choice; reading is in `checkpoint` and `gguf_source`. Downloads take safetensors, JSON and tokenizer files and nothing that
could be run."""

from __future__ import annotations

import re
from pathlib import Path

from joulemark.errors import BadInput, NotFound, Unavailable
from joulemark_exporter import checkpoint, gguf_source
from joulemark_exporter.weights import Model

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w.-]+)?")
HUB_FILES = ["*.safetensors", "*.json", "tokenizer.model", "*.jinja", "merges.txt", "vocab.txt"]


def open_model(words: str, cache: Path) -> Model:
    """The model that `words` means; headers only are read. Raises NotFound, BadInput, Unavailable."""
    path = Path(words).expanduser()
    if path.is_dir():
        return checkpoint.open_folder(path)
    if path.is_file():
        if path.suffix != ".gguf":
            raise BadInput(f"{path} is neither a folder nor a .gguf file", "give the folder that holds config.json")
        return gguf_source.open_file(path, cache)
    if HUB_ID.fullmatch(words):
        return checkpoint.open_folder(_download(words, cache))
    raise NotFound(
        f"there is no model at {path}", "give a Hugging Face folder, a .gguf file, or a hub id such as owner/name"
    )


def _download(words: str, cache: Path) -> Path:
    from huggingface_hub import snapshot_download

    name, _, revision = words.partition("@")
    try:
        found = snapshot_download(name, revision=revision or None, allow_patterns=HUB_FILES, cache_dir=cache / "hub")
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise Unavailable(
            f"{name} could not be fetched from the Hugging Face hub: {reason}",
            "give the path of a local folder, or try again when connected",
        ) from error
    return Path(found)
