"""Hugging Face's optimum in an environment of its own, both ends. Its exporter wants transformers before 4.58, which cannot be installed
beside the exporter's own, and reads a checkpoint's newer keys as if they were not there.

Owns where that environment is, the process in it, and what it is asked for. Not aware of artifacts. The other end imports optimum and
nothing of the exporter's heavy parts."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from joulemark.errors import EngineFailed, JoulemarkError, MissingExtra, NoSpace

VARIABLE = "JOULEMARK_OPTIMUM"
PACKAGES = ("optimum", "optimum-onnx", "transformers", "torch")
"""What decides about its graphs."""
MODULE = "joulemark_exporter.optimum_environment"
TAIL_CHARACTERS = 1500
LIMIT_S = 6 * 3600.0
"""A graph takes minutes; whoever says nothing for longer hangs."""


def environment() -> Path:
    """The environment's folder: what the variable says, else `NAME-optimum` beside the environment that this program runs in."""
    stated = os.environ.get(VARIABLE)
    own = Path(sys.prefix)
    return Path(stated).expanduser() if stated else own.with_name(f"{own.name}-optimum")


def is_there() -> bool:
    """Whether there is one. What is in it shows when it is asked."""
    return _python().is_file()


def versions() -> dict[str, str]:
    """Versions of PACKAGES there, each as `optimum environment: NAME`. Raises MissingExtra."""
    answer = json.loads(_ask("versions"))
    return {f"optimum environment: {name}": version for name, version in answer.items()}


def write_graph(checkpoint: Path, folder: Path, threads: int) -> Path:
    """Has optimum write the graph of a checkpoint in transformers 4's form into `folder`. Returns the graph. Raises MissingExtra,
    EngineFailed."""
    _ask("graph", str(checkpoint), str(folder), str(threads))
    return folder / "model.onnx"


def _python() -> Path:
    return environment() / "bin" / "python"


def _ask(*arguments: str) -> str:
    """What the other end answers on its standard output."""
    python = _python()
    if not python.is_file():
        raise MissingExtra(
            f"optimum's environment is not at {environment()}",
            f"make install-optimum, or name its folder in ${VARIABLE}",
        )
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONNOUSERSITE": "1"}
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    command = [str(python), "-m", MODULE, *arguments]
    # The other end stops when this pipe ends: whoever is killed leaves no process behind that writes into a folder of others.
    reading, writing = os.pipe()
    try:
        done = subprocess.run(
            command,
            stdin=reading,
            env={**kept, **offline},
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise EngineFailed(
            f"optimum has not answered within {LIMIT_S / 3600:g} hours", "use the onnx writer"
        ) from error
    finally:
        os.close(reading)
        os.close(writing)
    if done.returncode:
        raise _failure(done.returncode, done.stderr.strip()[-TAIL_CHARACTERS:])
    return done.stdout


def _failure(status: int, said: str) -> JoulemarkError:
    last = said.splitlines()[-1] if said else "it does not say why"
    if "ModuleNotFoundError" in said:
        return MissingExtra(f"optimum's environment at {environment()} is not whole: {last}", "make install-optimum")
    if os.strerror(errno.ENOSPC) in said:
        return NoSpace(f"the disk is full where optimum writes: {last}", "free some space and start again")
    if status == -signal.SIGKILL:
        return EngineFailed(
            "optimum was killed", "was there memory for the model in 32 bits, twice? use the onnx writer"
        )
    return EngineFailed(f"optimum ended with status {status}: {said}", "nothing was published; use the onnx writer")


# --- the other end -----------------------------------------------------------------------------------------------------
def main(asked: str, arguments: Sequence[str]) -> None:
    """Answers on standard output; whatever libraries print goes elsewhere."""
    answer, sys.stdout = sys.stdout, sys.stderr
    if asked == "versions":
        from importlib import metadata

        json.dump({name: metadata.version(name) for name in PACKAGES}, answer)
        return
    threading.Thread(target=_end_with_the_asker, daemon=True).start()
    checkpoint, folder, threads = arguments
    _export(checkpoint, folder, int(threads))


def _end_with_the_asker() -> None:
    os.read(0, 1)  # nothing is ever written: it returns when the pipe ends
    os._exit(1)


def _export(checkpoint: str, folder: str, threads: int) -> None:
    import torch
    from optimum.exporters.onnx import onnx_export_from_model  # type: ignore[import-not-found]
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    # Plain attention: transformers 4.57's fused one leaves out Gemma 2's soft cap of scores, without a word.
    model: Any = AutoModelForCausalLM.from_pretrained(
        checkpoint, attn_implementation="eager", dtype=torch.float32, local_files_only=True, trust_remote_code=False
    )
    # Its own check compares with the very model that was traced; what was written is looked at by the exporter.
    onnx_export_from_model(model, folder, task="text-generation-with-past", do_validation=False, device="cpu")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
