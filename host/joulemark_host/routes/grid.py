"""The grid as page, JSON and CSV, and what pages are made of."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Query
from fastapi.responses import HTMLResponse, Response

from joulemark.errors import NotFound
from joulemark_host.access import Access
from joulemark_host.figures import Figure, draw, grid_csv
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

    def figure(metric: str | None, task: str | None) -> tuple[Figure | None, Choice]:
        tasks = records.tasks()
        metric = metric or DEFAULT_METRIC
        if not tasks:
            return None, Choice(metric=metric)
        if task is not None and task not in tasks:
            raise NotFound(f"there is no record of task {task!r}", f"there is: {', '.join(tasks)}")
        task = task or tasks[0]
        boards, models = records.names()
        columns = {key: (manifest.name, manifest.quantization) for key, manifest in shelf.artifacts().items()} | models
        drawn = draw(records.cells(task, metric), metric, task, columns, boards)
        return drawn, Choice(tasks=tasks, task=task, metric=metric)

    def needed(metric: str | None, task: str | None) -> Grid:
        drawn, _ = figure(metric, task)
        if drawn is None:
            raise NotFound("there are no records yet", "`joulemark run` evaluates a model on a board")
        return drawn.grid

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
        drawn, choice = figure(metric, task)
        return online_page([drawn] if drawn else [], choice)

    @router.get("/pages/{name}")
    def pages(name: str) -> Response:
        if name not in STATIC_TYPES:
            raise NotFound(f"there is no page file {name[:80]!r}", f"there is: {', '.join(STATIC_TYPES)}")
        return Response(static(name), media_type=STATIC_TYPES[name], headers={"Cache-Control": "no-cache"})

    return router
