"""Figures for Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Histogram

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """The figures of one service, in a registry of its own.

    Attributes:
        registry: to which other parts may add theirs.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "msa_requests", "Requests answered.", ("route", "code"), registry=self.registry
        )
        self.ask_seconds = Histogram(
            "msa_ask_seconds", "Of a question.", buckets=_SECONDS, registry=self.registry
        )
