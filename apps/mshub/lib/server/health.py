"""Is the server alive, can it work, and how busy is it: for whoever watches over it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fastapi.responses import JSONResponse, Response
from fastapi.routing import APIRoute
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from lib.free_space import RESERVE_BYTES, free_bytes
from lib.server.access import Guards
from mshub.errors import MSHubError

SECONDS = (0.01, 0.05, 0.1, 0.5, 1, 5, 10, 30, 60, 300, 1800)


class RequestMetrics:
    """Requests by route, counted and timed.

    Parameters
    ----------
    registry : CollectorRegistry
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        labels = ("method", "route")
        self._count = Counter("mshub_requests", "Requests answered.", (*labels, "status"), registry=registry)
        self._time = Histogram(
            "mshub_request_seconds", "Time until the answer was sent.", labels, buckets=SECONDS, registry=registry
        )

    def observe(self, method: str, route: str, status: int, seconds: float) -> None:
        """Count one answer; `route` has its parameters in braces, so that there are few of them."""
        self._count.labels(method, route, str(status)).inc()
        self._time.labels(method, route).observe(seconds)


class AppCollector(Collector):
    """What the app itself counts.

    Parameters
    ----------
    find_status : callable
        Returns what `MSHubApp.status` does.
    """

    def __init__(self, find_status: Callable[[], dict[str, Any]]) -> None:
        self._find_status = find_status

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics, as they are now."""
        status = self._find_status()
        yield InfoMetricFamily("mshub_build", "The software.", {"version": status["version"]})
        running = GaugeMetricFamily("mshub_predictions", "Predictions at work, by stage.", labels=["stage"])
        stages = [run["stage"] for run in status["running"]]
        for stage in ("waiting", "loading", "predicting"):
            running.add_metric([stage], stages.count(stage))
        yield running
        ended = CounterMetricFamily("mshub_predictions_ended", "Predictions that ended, by how.", labels=["outcome"])
        for outcome in ("finished", "failed", "refused"):
            ended.add_metric([outcome], status[outcome])
        yield ended
        yield GaugeMetricFamily("mshub_networks_loaded", "Networks in memory.", len(status["loaded"]))
        yield GaugeMetricFamily("mshub_models", "Models that are served.", len(status["models"]))


class Health:
    """The routes.

    Parameters
    ----------
    find_home : callable
        Returns `MSHUB_HOME`.
    find_status : callable
        Returns what `MSHubApp.status` does.
    """

    def __init__(self, find_home: Callable[[], Path], find_status: Callable[[], dict[str, Any]]) -> None:
        self._find_home = find_home
        self._registry = CollectorRegistry()
        self._registry.register(AppCollector(find_status))
        for standard in (ProcessCollector, PlatformCollector):
            standard(registry=self._registry)
        self.requests = RequestMetrics(self._registry)

    def routes(self) -> list[APIRoute]:
        """Return them all."""
        answers = [("/health/live", self.live), ("/health/ready", self.ready), ("/metrics", self.metrics)]
        return [APIRoute(path, answer, methods=["GET"], tags=["Health"]) for path, answer in answers]

    async def live(self) -> dict[str, str]:
        """Say that the process answers; it does not wait for a thread, as all may be busy."""
        return {"status": "alive"}

    def ready(self) -> JSONResponse:
        """Say whether the server can work, 200 or 503, and what is in the way; no names and no paths."""
        reasons = list(self._in_the_way())
        return JSONResponse({"ready": not reasons, "reasons": reasons}, 503 if reasons else 200)

    def metrics(self) -> Response:
        """Return what Prometheus reads."""
        return Response(generate_latest(self._registry), media_type=CONTENT_TYPE_LATEST)

    def _in_the_way(self) -> Iterator[str]:
        try:
            home = self._find_home()
            free = free_bytes(home)
        except Exception as error:  # whatever keeps the app from starting
            yield f"the app does not start ({type(error).__name__}); see the log"
            return
        if free < RESERVE_BYTES:
            yield f"the disk is full: {free / 1e6:,.0f} MB are left, expected {RESERVE_BYTES / 1e6:,.0f} MB"
        if not os.access(home, os.W_OK):
            yield "MSHUB_HOME cannot be written to"
        try:
            Guards.of(home).users.users()
        except MSHubError:
            yield "the file of users is damaged or gone, and nobody can log in; see the log"
