"""An engine in a process of its own, both ends: it opens a written artifact and answers with tokens and logits.

Owns the process and the few lines that go to and fro; logits come back through a file, because they are large. An engine that crashes is an
error with its last words, not the end of the exporter. Not aware of what is compared.
"""

from __future__ import annotations

import contextlib
import json
import select
import subprocess
import sys
import tempfile
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from joulemark import plugins
from joulemark.errors import EngineFailed, to_problem
from joulemark_exporter.peak_memory import peak_bytes

PACKAGE = "joulemark_exporter.engines"
TAIL_BYTES = 2000
SILENCE_S = 1800.0
"""Loading a model and computing a window take minutes at most; an engine that is silent for longer hangs."""


class Probe:
    """An opened artifact."""

    def __init__(self, process: subprocess.Popen[bytes], errors: BinaryIO, shared: Path) -> None:
        self._process, self._errors, self._shared = process, errors, shared

    def _ask(self, question: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(question).encode() + b"\n")
            self._process.stdin.flush()
            self._wait()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = b""
        if not line:
            self._process.wait()
            self._errors.seek(0)
            said = self._errors.read()[-TAIL_BYTES:].decode(errors="replace").strip()
            raise EngineFailed(
                f"the engine ended with status {self._process.returncode} while it read the artifact: {said}",
                "what was written is not what the engine reads; nothing was published",
            )
        answer = json.loads(line)
        if "problem" in answer:
            raise EngineFailed(answer["problem"]["message"], answer["problem"]["hint"])
        return answer

    def _wait(self) -> None:
        """Until the engine answers; a question has one line of answer. Raises EngineFailed when it is silent for too long."""
        assert self._process.stdout is not None
        if not select.select([self._process.stdout], [], [], SILENCE_S)[0]:
            raise EngineFailed(
                f"the engine has said nothing for {SILENCE_S:g} s: it hangs on the artifact",
                "nothing was published; try fewer threads, or a shorter window in [probe]",
            )

    def tokenize(self, text: str) -> list[int]:
        """As the board tokenizes a prompt."""
        return self._ask({"tokenize": text})["tokens"]

    def chat_template(self) -> str | None:
        """The chat template that the engine finds in the artifact."""
        return self._ask({"chat_template": True})["chat_template"]

    def logits(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """(tokens, vocabulary) float32, mapped: valid until the next call."""
        shape = self._ask({"logits": list(tokens)})["shape"]
        return np.memmap(self._shared, np.float32, "r", shape=tuple(shape))

    def peak_memory_bytes(self) -> int:
        """The most that the process has had in memory."""
        return int(self._ask({"memory": True})["peak_bytes"])


@contextlib.contextmanager
def opened(engine: str, path: Path, threads: int) -> Generator[Probe]:
    """The artifact's main file in an engine's process. Raises EngineFailed."""
    with tempfile.TemporaryDirectory(prefix="joulemark-probe-") as folder, tempfile.TemporaryFile() as errors:
        shared = Path(folder) / "logits"
        command = [sys.executable, "-m", "joulemark_exporter.probe", engine, str(path), str(threads), str(shared)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors) as process:
            try:
                yield Probe(process, errors, shared)
            finally:
                process.kill()
                assert process.stdin is not None
                # A question that a dead engine never read is still in the buffer; its loss must not hide why the engine died.
                with contextlib.suppress(BrokenPipeError):
                    process.stdin.close()


def main(engine: str, path: str, threads: str, shared: str) -> None:
    """The other end: answers one line with one line until its input ends."""
    output = sys.stdout
    sys.stdout = sys.stderr  # whatever an engine prints is not an answer
    try:
        session = plugins.load(PACKAGE, engine).Engine(Path(path), int(threads))
    except Exception as error:  # noqa: BLE001 - every failure becomes an answer to the first question
        sys.stdin.readline()
        _answer(output, {"problem": to_problem(error).model_dump()})
        return
    for line in sys.stdin:
        try:
            answer = _work(session, json.loads(line), Path(shared))
        except Exception as error:  # noqa: BLE001 - the asking process decides what a failure means
            answer = {"problem": to_problem(error).model_dump()}
        _answer(output, answer)


def _answer(output: Any, answer: dict[str, Any]) -> None:
    output.write(json.dumps(answer) + "\n")
    output.flush()


def _work(session: Any, question: dict[str, Any], shared: Path) -> dict[str, Any]:
    if "tokenize" in question:
        return {"tokens": session.tokenize(question["tokenize"])}
    if "chat_template" in question:
        return {"chat_template": session.chat_template()}
    if "memory" in question:
        return {"peak_bytes": peak_bytes()}
    values = session.logits(question["logits"])
    values.tofile(shared)
    return {"shape": values.shape}


if __name__ == "__main__":
    main(*sys.argv[1:])
