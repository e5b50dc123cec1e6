"""Counts as the client libraries themselves read them: Prometheus over HTTP, OpenTelemetry through its own reader."""

import json
import logging
import urllib.request
from collections.abc import Callable
from typing import Any

import pytest
import torch
from guarded import LARGE
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.parser import text_string_to_metric_families
from torch import Tensor

import stabilitykit as sk
from stabilitykit.guards.metrics import OpenTelemetryMetrics, PrometheusMetrics

Make = Callable[..., Any]


def guarded(model: Any, ids: Tensor, how: Any, **options: Any) -> None:
    with sk.guard(model, how, **options):
        model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=2, min_new_tokens=2)


def test_prometheus_is_scraped_over_http(theirs: Make, ids: Tensor) -> None:
    registry = CollectorRegistry()
    server, thread = start_http_server(0, addr="127.0.0.1", registry=registry)
    try:
        guarded(theirs(), ids, "retry", metrics=[PrometheusMetrics(registry)], watch="residual")
        url = f"http://127.0.0.1:{server.server_port}/metrics"
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url) as answer:
            text = answer.read().decode()
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
    samples = {
        (one.name, one.labels.get("site"), one.labels.get("kind")): one.value
        for family in text_string_to_metric_families(text)
        for one in family.samples
    }
    prefix = "stabilitykit_guard_"
    assert samples[f"{prefix}breaks_total", "embed_tokens", "overflow"] == 1
    assert samples[f"{prefix}retries_total", None, None] == 1
    assert samples[f"{prefix}steps_total", None, None] == 2
    assert 0 < samples[f"{prefix}least_headroom_bits", None, None] < 16


def test_opentelemetry_counts_the_same(theirs: Make, ids: Tensor) -> None:
    reader = InMemoryMetricReader()
    meter = MeterProvider(metric_readers=[reader]).get_meter("test")
    guarded(theirs(), ids, "retry", metrics=[OpenTelemetryMetrics(meter)])
    found = reader.get_metrics_data()
    assert found is not None
    points: dict[str, Any] = {
        metric.name: metric.data.data_points
        for resource in found.resource_metrics
        for scope in resource.scope_metrics
        for metric in scope.metrics
    }
    prefix = "stabilitykit.guard."
    (broke,) = points[f"{prefix}breaks"]
    assert (broke.value, dict(broke.attributes)) == (1, {"site": "embed_tokens", "kind": "overflow"})
    assert [points[f"{prefix}{name}"][0].value for name in ("retries", "steps")] == [1, 2]
    (headroom,) = points[f"{prefix}headroom"]
    assert headroom.count == 2
    assert 0 < headroom.min < 16


def test_logging_has_fields_that_json_can_hold(theirs: Make, ids: Tensor, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="stabilitykit.guard"):
        guarded(theirs(), ids, "stop")
    (record,) = (one for one in caplog.records if one.name == "stabilitykit.guard")
    fields = {name: value for name, value in vars(record).items() if name.startswith("guard_")}
    assert json.loads(json.dumps(fields)) == fields
    wanted = {"guard_event": "break", "guard_row": 1, "guard_phase": "prefill", "guard_step": 0, "guard_position": 2}
    wanted |= {"guard_token": LARGE, "guard_site": "embed_tokens", "guard_kind": "overflow", "guard_did": "stopped"}
    assert wanted.items() <= fields.items()
    assert record.levelno == logging.ERROR
    assert "row 1 broke in prefill" in record.getMessage()
