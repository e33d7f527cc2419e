"""Metrics for Prometheus: the queue and its outcomes from the store, and how long the API takes to answer."""

import time
from collections.abc import Iterator

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from opensoraplan.serve.service import Service
from opensoraplan.serve.store import BUCKETS, OUTCOMES

_ANSWER_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1, 5, 30)


class Metrics:
    """The metrics of a server."""

    def __init__(self, service: Service) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_StoreCollector(service))
        self._answers = Histogram(
            "osp_http_seconds",
            "Seconds from a request to the beginning of its answer",
            ("method", "route", "status"),
            buckets=_ANSWER_BUCKETS,
            registry=self._registry,
        )

    def text(self) -> tuple[bytes, str]:
        """All metrics in Prometheus' text format, and its media type."""
        return generate_latest(self._registry), CONTENT_TYPE_LATEST

    def timing(self, app: ASGIApp) -> ASGIApp:
        """The app, with its answers timed. Paths are counted by their route: ids would be too many."""

        async def timed(scope: Scope, receive: Receive, send: Send) -> None:
            begin = time.perf_counter()

            async def observe(message: Message) -> None:
                if message["type"] == "http.response.start":
                    route = getattr(scope.get("route"), "path", "none")
                    labels = scope["method"], route, str(message["status"])
                    self._answers.labels(*labels).observe(time.perf_counter() - begin)
                await send(message)

            await app(scope, receive, observe if scope["type"] == "http" else send)

        return timed


class _StoreCollector(Collector):
    """What the store says at the time of asking."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def collect(self) -> Iterator[Metric]:
        service = self._service
        counts, totals = service.store.counts(), service.store.totals()
        yield GaugeMetricFamily("osp_queue", "Jobs that wait", value=counts.get("queued", 0))
        yield GaugeMetricFamily("osp_running", "Jobs that are made now", value=counts.get("in_progress", 0))
        yield GaugeMetricFamily("osp_workers", "Workers that are ready", value=len(service.ready_workers()))
        outcomes = CounterMetricFamily("osp_videos", "Jobs that have ended", labels=["outcome"])
        for outcome in OUTCOMES:
            outcomes.add_metric([outcome], totals[outcome])
        yield outcomes
        yield CounterMetricFamily(
            "osp_retries", "Jobs put back after their worker died", value=totals["retried"]
        )
        yield CounterMetricFamily("osp_steps", "Denoising steps", value=totals["steps"])
        buckets = [(str(bound), totals[f"within_{bound}"]) for bound in BUCKETS]
        yield HistogramMetricFamily(
            "osp_video_seconds",
            "Seconds from a request to its video",
            buckets=[*buckets, ("+Inf", totals["completed"])],
            sum_value=totals["seconds"],
        )

    def describe(self) -> list[Metric]:
        return []  # so that the store is not asked before it must be
