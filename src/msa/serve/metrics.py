"""Figures for Prometheus. No label holds what a client wrote; banks have figures of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from msa.memory.loaded.content_store import CONTENT_READ
from msa.types import Answer

if TYPE_CHECKING:
    from msa.serve.banks import ServedBank

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """The figures of one service.

    Attributes:
        registry: of the service; other parts add theirs here.
        bank_registry: of the banks, whose labels are names of banks.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.bank_registry = CollectorRegistry()
        own = self.registry
        self.requests = Counter(
            "msa_requests", "Requests answered.", ("route", "code"), registry=own
        )
        self.ask_seconds = Histogram(
            "msa_ask_seconds",
            "From the arrival of a question to its answer.",
            buckets=_SECONDS,
            registry=own,
        )
        self.route_seconds = Histogram(
            "msa_route_seconds", "Routing of a question.", buckets=_SECONDS, registry=own
        )
        self.first_token_seconds = Histogram(
            "msa_time_to_first_token_seconds",
            "From the arrival of a streamed question to the first token of its answer.",
            buckets=_SECONDS,
            registry=own,
        )
        self.rounds = Histogram(
            "msa_rounds", "Rounds of a question.", buckets=(1, 2, 3, 4, 6, 8, 16), registry=own
        )
        self.tokens = Counter(
            "msa_tokens", "Tokens read (prompt) and written (generated).", ("kind",), registry=own
        )
        self.asks_ended = Counter(
            "msa_asks", "Questions, by how they ended.", ("outcome",), registry=own
        )
        self.rejected = Counter(
            "msa_queue_rejected", "Questions refused at once.", ("reason",), registry=own
        )
        self.queue_depth = Gauge(
            "msa_queue_depth", "Questions that run or wait for the model.", registry=own
        )
        own.register(_ContentRead())

    def watch_banks(self, banks: Callable[[], Iterable[ServedBank]]) -> None:
        """Have the figures of banks read whenever they are scraped."""
        self.bank_registry.register(_Banks(banks))

    def watch_jobs(self, counts: Callable[[], Mapping[str, int]]) -> None:
        """Have the jobs counted whenever the figures are scraped.

        Args:
            counts: status -> number of jobs.
        """
        self.registry.register(_Jobs(counts))

    def token(self, first_seconds: float | None) -> None:
        """Count a piece of an answer; with the seconds it took to come if it is the first."""
        self.tokens.labels("generated").inc()
        if first_seconds is not None:
            self.first_token_seconds.observe(first_seconds)

    def answered(self, answer: Answer, pieces: int, seconds: float) -> None:
        """Count what an answer cost, of which so many pieces have been counted."""
        usage = answer.usage
        self.asks_ended.labels("answered").inc()
        self.ask_seconds.observe(seconds)
        self.route_seconds.observe(usage.routing_seconds)
        self.rounds.observe(len(answer.rounds))
        self.tokens.labels("prompt").inc(usage.prompt_tokens)
        self.tokens.labels("generated").inc(max(0, usage.generated_tokens - pieces))

    def text(self, *, with_banks: bool) -> bytes:
        """All figures in Prometheus' text format."""
        text = generate_latest(self.registry)
        return text + generate_latest(self.bank_registry) if with_banks else text


class _Banks(Collector):
    """Figures of the banks as they are when asked for."""

    def __init__(self, banks: Callable[[], Iterable[ServedBank]]) -> None:
        self._banks = banks

    def describe(self) -> Iterable[Metric]:
        """Nothing is known before there are banks."""
        return ()

    def collect(self) -> Iterator[Metric]:
        """One figure after the other."""
        documents = GaugeMetricFamily("msa_bank_documents", "Documents.", labels=["bank"])
        size = GaugeMetricFamily("msa_bank_bytes", "Size on disk.", labels=["bank"])
        generation = GaugeMetricFamily("msa_bank_generation", "Commits so far.", labels=["bank"])
        for served in self._banks():
            info = served.bank.info()
            documents.add_metric([served.name], info.num_ids)
            size.add_metric([served.name], info.segment_bytes + info.catalog_bytes)
            generation.add_metric([served.name], info.generation)
        yield from (documents, size, generation)


class _ContentRead(Collector):
    """What the banks of this process have counted."""

    def collect(self) -> Iterator[Metric]:
        """The one figure."""
        total = CONTENT_READ.total
        yield CounterMetricFamily(
            "msa_content_bytes_read", "Content fetched for questions.", value=total
        )


class _Jobs(Collector):
    """Jobs as they are when asked for."""

    def __init__(self, counts: Callable[[], Mapping[str, int]]) -> None:
        self._counts = counts

    def describe(self) -> Iterable[Metric]:
        """Nothing is known before the state folder is open."""
        return ()

    def collect(self) -> Iterator[Metric]:
        """The one figure."""
        jobs = GaugeMetricFamily("msa_jobs", "Jobs that are remembered.", labels=["status"])
        for status, count in sorted(self._counts().items()):
            jobs.add_metric([status], count)
        yield jobs
