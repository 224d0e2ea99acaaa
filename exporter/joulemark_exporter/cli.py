"""The workstation's command: `joulemark export`. What it shows; what it does is in `pipeline`."""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from joulemark.errors import BadInput, Conflict, MissingExtra
from joulemark.sources import default_cache

if TYPE_CHECKING:
    from rich.progress import TaskID

    from joulemark_exporter import pipeline

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None)

EPILOG = """An example of a recipe:

\b
  name = "smollm2-gptq4"
  #
  [quantizer]
  use = "gptq"          # none, rtn, gptq, kquant, lobi
  bits = 4
  group_size = 32
  #
  [calibration]
  dataset = "passages"  # a known text or the path of a text file
  samples = 128
  tokens = 512
  #
  [writer]
  use = "gguf"          # gguf, onnx, optimum (in an environment of its own: make install-optimum)
  #
  [limits]              # what fails one of them is not published
  divergence = 0.3
  top1_agreement = 0.75
"""


@app.callback()
def joulemark() -> None:
    """Which compressed language model should run on this board, and what does one correct answer cost there?"""


@app.command(epilog=EPILOG)
def export(
    model: Annotated[str, typer.Argument(help="a Hugging Face folder, a .gguf file, or a hub id (owner/name)")],
    recipe: Annotated[Path, typer.Option("--recipe", "-r", help="the TOML file that says what to make of it")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="the artifact's folder; default: the recipe's name")
    ] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option("--adapter", "-a", help="a PEFT folder to fold in, PATH or PATH=SCALE; may be repeated"),
    ] = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            help="also write the model as a Hugging Face folder here: folded, and with the integers in GPTQ's layout where there are some"
        ),
    ] = None,
    threads: Annotated[int, typer.Option(min=1, max=1024, help="processor cores to use")] = len(
        os.sched_getaffinity(0)
    ),
    as_json: Annotated[bool, typer.Option("--json", help="print the report as JSON")] = False,
) -> None:
    """Turn a model into one verified artifact: fold adapters, quantize, write, look at it through the board's engine, publish."""
    _require_parts()
    from joulemark_exporter import pipeline
    from joulemark_exporter import recipe as recipes

    chosen = recipes.read(recipe)
    name = chosen.name or recipe.stem
    request = pipeline.Request(
        model=model,
        recipe=chosen,
        out=(out or Path(name)).resolve(),
        cache=default_cache(),
        threads=threads,
        adapters=tuple(_adapter(words) for words in adapter or ()),
        checkpoint=None if checkpoint is None else checkpoint.resolve(),
    )
    with _progress(quiet=as_json) as say:
        exported = pipeline.export(request, say)
    if as_json:
        sys.stdout.write(json.dumps({"folder": str(exported.folder), **exported.report}, indent=1) + "\n")
        return
    _show(exported)


@app.command()
def adapter(
    folder: Annotated[Path, typer.Argument(help="a PEFT folder")],
    base: Annotated[str, typer.Option("--base", "-b", help="the model that it was trained for, as in export")],
    out: Annotated[Path, typer.Option("--out", "-o", help="the .gguf file to write")],
) -> None:
    """Write a LoRA adapter as a GGUF file of its own, so that llama.cpp can put it on a running model and take it off again.

    Example: joulemark adapter my-lora --base smollm2-folder -o my-lora.gguf
    """
    _require_parts()
    from joulemark_exporter import adapter_gguf, lora, models

    if out.exists():
        raise Conflict(f"{out} exists", "choose another -o, or remove that file")
    chosen = lora.read_adapter(folder.expanduser())
    adapter_gguf.write(out, chosen, models.open_model(base, default_cache()))
    typer.echo(f"{out}: {len(chosen.deltas)} matrices changed by {chosen.name}")


def _adapter(words: str) -> tuple[Path, float]:
    path, mark, scale = words.rpartition("=")
    if not mark:
        return Path(words), 1.0
    try:
        return Path(path), float(scale)
    except ValueError as error:
        raise BadInput(f"--adapter {words}: {scale!r} is not a number", "write PATH or PATH=SCALE") from error


def _require_parts() -> None:
    """Raises MissingExtra where the exporter's libraries are not installed."""
    try:
        importlib.import_module("joulemark_exporter.pipeline")
    except ImportError as error:
        raise MissingExtra(
            f"the exporter needs a part that is not installed ({error})", "make install-export"
        ) from error


@contextmanager
def _progress(quiet: bool) -> Generator[pipeline.Say]:
    """A bar for every step that takes its time; on a terminal only."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    numbers = (TaskProgressColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(TextColumn("{task.description}"), BarColumn(), *numbers, console=console, disable=quiet) as progress:
        bars: dict[str, TaskID] = {}

        def say(step: str, done: int, total: int) -> None:
            if step not in bars:
                bars[step] = progress.add_task(step, total=None)
            # A step in one piece says nothing while it lasts: its bar moves without a length.
            progress.update(bars[step], completed=done, total=None if (done, total) == (0, 1) else total)

        yield say


def _show(exported: pipeline.Exported) -> None:
    """The artifact and what was found, for people."""
    from rich.console import Console
    from rich.table import Table

    manifest, findings = exported.manifest, exported.report.get("findings", {})
    table = Table(title=f"{manifest.name}: {manifest.quantization}", header_style="bold")
    table.add_column("figure")
    table.add_column("value", justify="right")
    table.add_row("bytes of weights", f"{manifest.weight_bytes:,}")
    table.add_row("bits per weight", f"{manifest.bits_per_weight:.2f}")
    if findings:
        table.add_row("divergence from the unquantized model (nats)", f"{findings['divergence']:.4g}")
        table.add_row("same most likely token", f"{findings['top1_agreement']:.1%}")
        table.add_row("perplexity", f"{findings['perplexity']:.3f}")
        table.add_row("perplexity of the unquantized model", f"{findings['reference_perplexity']:.3f}")
        table.add_row("probe", f"{findings['tokens']} tokens of {exported.report['probe']['text']}")
    console = Console()
    console.print(table)
    console.print(f"{exported.folder}\nartifact {exported.artifact_id}", highlight=False)
