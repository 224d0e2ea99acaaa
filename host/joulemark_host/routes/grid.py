"""The grid as page, JSON and CSV, and what pages are made of."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Query
from fastapi.responses import HTMLResponse, Response

from joulemark.errors import NotFound
from joulemark_host.access import Access
from joulemark_host.facts import RunFacts
from joulemark_host.figures import draw, grid_csv, grid_of
from joulemark_host.grid import Grid
from joulemark_host.page import STATIC_TYPES, Choice, online_page, static
from joulemark_host.records import Records
from joulemark_host.shelf import Shelf

DEFAULT_METRIC = "accuracy"


class CsvResponse(Response):
    """A table that a spreadsheet opens."""

    media_type = "text/csv"


Name = Annotated[str | None, Query(max_length=80)]


def create_router(shelf: Shelf, records: Records, access: Access) -> APIRouter:
    """For viewers and operators; scripts and style are public, the page that lets people in needs them."""
    router = APIRouter()
    readers = [Depends(access.guard("viewer", "operator"))]

    def asked(metric: str | None, task: str | None) -> Choice:
        """What is meant; without a task when there are no records yet. Raises NotFound."""
        tasks, metric = records.tasks(), metric or DEFAULT_METRIC
        if tasks and task is not None and task not in tasks:
            raise NotFound(f"there is no record of task {task!r}", f"there is: {', '.join(tasks)}")
        return Choice(tasks=tasks, task=task or tasks[0], metric=metric) if tasks else Choice(metric=metric)

    def made_of(choice: Choice) -> tuple[list[RunFacts], str, str, dict[str, tuple[str, str]], dict[str, str]]:
        """What `grid_of` and `draw` take."""
        boards, models = records.names()
        columns = {key: (manifest.name, manifest.quantization) for key, manifest in shelf.artifacts().items()} | models
        return records.cells(choice.task, choice.metric), choice.metric, choice.task, columns, boards

    def needed(metric: str | None, task: str | None) -> Grid:
        choice = asked(metric, task)
        if not choice.tasks:
            raise NotFound("there are no records yet", "`joulemark run` evaluates a model on a board")
        return grid_of(*made_of(choice))

    @router.get("/api/grid.json", dependencies=readers)
    def grid_json(metric: Name = None, task: Name = None) -> Grid:
        return needed(metric, task)

    @router.get("/api/grid.csv", response_class=CsvResponse, dependencies=readers)
    def grid_as_csv(metric: Name = None, task: Name = None) -> Response:
        grid = needed(metric, task)
        disposition = f'attachment; filename="{grid.metric}-{grid.task}.csv"'
        return CsvResponse(grid_csv(grid), headers={"Content-Disposition": disposition})

    @router.get("/", response_class=HTMLResponse, dependencies=readers)
    def page(metric: Name = None, task: Name = None) -> str:
        choice = asked(metric, task)
        return online_page([draw(*made_of(choice))] if choice.tasks else [], choice)

    @router.get("/pages/{name}")
    def pages(name: str) -> Response:
        if name not in STATIC_TYPES:
            raise NotFound(f"there is no page file {name[:80]!r}", f"there is: {', '.join(STATIC_TYPES)}")
        return Response(static(name), media_type=STATIC_TYPES[name], headers={"Cache-Control": "no-cache"})

    return router
