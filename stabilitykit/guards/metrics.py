"""Where a guard counts: what a sink of metrics is told, and those of Prometheus and OpenTelemetry."""

import threading
from typing import Any, Protocol

from stabilitykit.errors import MisuseError

UNKNOWN = "unknown"
"""The site or kind of a break of which it is not known."""


class Metrics(Protocol):
    """Told what happens, by the thread that runs the model: nothing here may wait."""

    def stepped(self, headroom: float | None) -> None:
        """A step was watched; its least headroom in bits, None where none was measured."""
        ...

    def broke(self, site: str, kind: str) -> None:
        """A row broke, there and so; what is not known is "unknown"."""
        ...

    def retried(self) -> None:
        """A row goes on in a wider dtype."""
        ...


class PrometheusMetrics:
    """Counters and a gauge in a registry of prometheus_client, its default one unless another is given.

    stabilitykit_guard_breaks_total{site, kind}, stabilitykit_guard_retries_total (rows), stabilitykit_guard_steps_total
    and stabilitykit_guard_least_headroom_bits, the least so far; NaN before the first. One a registry: a second raises
    prometheus_client's ValueError. Raises MisuseError where prometheus_client is not installed.
    """

    def __init__(self, registry: Any = None) -> None:
        try:
            import prometheus_client as client
        except ImportError:
            raise MisuseError(
                'Prometheus metrics need prometheus_client: pip install "stabilitykit[prometheus]".'
            ) from None
        where = client.REGISTRY if registry is None else registry
        prefix = "stabilitykit_guard_"
        self._breaks = client.Counter(f"{prefix}breaks", "Rows that broke.", ("site", "kind"), registry=where)
        self._retries = client.Counter(f"{prefix}retries", "Rows that went on in a wider dtype.", registry=where)
        self._steps = client.Counter(f"{prefix}steps", "Steps that were watched.", registry=where)
        self._headroom = client.Gauge(
            f"{prefix}least_headroom_bits", "Least headroom of any watched tensor so far, in bits.", registry=where
        )
        self._headroom.set(float("nan"))
        self._least = float("inf")
        self._lock = threading.Lock()

    def stepped(self, headroom: float | None) -> None:
        self._steps.inc()
        if headroom is not None:
            with self._lock:
                if headroom < self._least:
                    self._least = headroom
                    self._headroom.set(headroom)

    def broke(self, site: str, kind: str) -> None:
        self._breaks.labels(site=site, kind=kind).inc()

    def retried(self) -> None:
        self._retries.inc()


class OpenTelemetryMetrics:
    """The same as instruments of an OpenTelemetry meter, that of the global provider unless another is given.

    stabilitykit.guard.breaks with the attributes site and kind, .retries, .steps, and the histogram .headroom in bits,
    of each step's least. Raises MisuseError where opentelemetry is not installed.
    """

    def __init__(self, meter: Any = None) -> None:
        if meter is None:
            try:
                from opentelemetry import metrics
            except ImportError:
                raise MisuseError(
                    'OpenTelemetry metrics need opentelemetry-api: pip install "stabilitykit[otel]".'
                ) from None
            meter = metrics.get_meter("stabilitykit")
        prefix = "stabilitykit.guard."
        self._breaks = meter.create_counter(f"{prefix}breaks", description="Rows that broke.")
        self._retries = meter.create_counter(f"{prefix}retries", description="Rows that went on in a wider dtype.")
        self._steps = meter.create_counter(f"{prefix}steps", description="Steps that were watched.")
        self._headroom = meter.create_histogram(
            f"{prefix}headroom", unit="bit", description="Least headroom of a step's watched tensors."
        )

    def stepped(self, headroom: float | None) -> None:
        self._steps.add(1)
        if headroom is not None:
            self._headroom.record(headroom)

    def broke(self, site: str, kind: str) -> None:
        self._breaks.add(1, {"site": site, "kind": kind})

    def retried(self) -> None:
        self._retries.add(1)
