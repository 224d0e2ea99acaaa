"""The agent's state in Prometheus' text format. Absence is absence: a figure that is not known is not exported as 0."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric

from joulemark import __version__
from joulemark_agent.jobs import Jobs
from joulemark_agent.outbox import Outbox

CONTENT_TYPE = CONTENT_TYPE_LATEST


class _Collector:
    def __init__(self, jobs: Jobs, outbox: Outbox) -> None:
        self._jobs = jobs
        self._outbox = outbox

    def collect(self) -> Iterator[Metric]:
        yield InfoMetricFamily("joulemark_agent", "The agent's build", value={"version": __version__})
        states = self._jobs.states()
        by_status = GaugeMetricFamily("joulemark_runs", "Runs in the journal by status", labels=["status"])
        for status, count in Counter(state.status for state in states).items():
            by_status.add_metric([status], count)
        yield by_status
        done = GaugeMetricFamily("joulemark_run_items_done", "Answered items of the running run", labels=["run_id"])
        total = GaugeMetricFamily("joulemark_run_items_planned", "Items of the running run", labels=["run_id"])
        for state in states:
            if state.status == "running":
                done.add_metric([state.run_id], state.items_done)
                total.add_metric([state.run_id], state.items_total)
        yield done
        yield total
        yield GaugeMetricFamily("joulemark_outbox_pending", "Records not yet delivered", value=self._outbox.pending())
        yield CounterMetricFamily(
            "joulemark_outbox_dropped", "Records dropped undelivered", value=len(self._outbox.dropped())
        )


def exposition(jobs: Jobs, outbox: Outbox) -> str:
    """The whole page."""
    registry = CollectorRegistry()
    registry.register(_Collector(jobs, outbox))
    return generate_latest(registry).decode()
