"""Renders the engine's figures and the API's counts in Prometheus' text format."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import accumulate

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
)
from prometheus_client.core import Metric as Family
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from sailfish.engine.api import EngineInfo, EngineStats, Histogram
from sailfish.serve.metrics import names
from sailfish.serve.metrics.counters import split
from sailfish.serve.metrics.names import METRICS, Value

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def render(info: EngineInfo, stats: EngineStats, *, model: str, vllm: bool) -> bytes:
    """Return the exposition of one scrape."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Scrape(_families(info, stats, model, vllm)))
    return generate_latest(registry)


class _Scrape(Collector):
    def __init__(self, families: Iterable[Family]) -> None:
        self._families = list(families)

    def collect(self) -> Iterable[Family]:
        return self._families

    def describe(self) -> Iterable[Family]:
        return []


def _families(info: EngineInfo, stats: EngineStats, model: str, vllm: bool) -> Iterator[Family]:
    for metric in METRICS:
        value = metric.read(stats)
        yield _family(
            metric.name, metric.kind, f"{metric.help} Unit: {metric.unit}.", value, metric.label, model
        )
        if vllm and metric.vllm is not None:
            label = metric.vllm_label or metric.label
            yield _family(metric.vllm, metric.kind, metric.help, value, label, model)
    yield from _http(stats)
    about = {"model_name": model, "digest": info.digest, "device": info.device, "dtype": info.dtype}
    yield _info(names.ENGINE_INFO, "What the engine is.", about)
    if vllm:
        cache = {
            "model_name": model,
            "block_size": str(info.page_tokens),
            "num_gpu_blocks": str(info.n_blocks),
            "enable_prefix_caching": str(info.prefix_cache),
            "cache_dtype": info.dtype,
        }
        yield _info(names.CACHE_CONFIG_INFO, "How the KV cache is laid out.", cache)


def _family(name: str, kind: str, text: str, value: Value, label: str | None, model: str) -> Family:
    if isinstance(value, Histogram):
        histogram = HistogramMetricFamily(name, text, labels=["model_name"])
        bounds = [*map(floatToGoString, value.bounds), "+Inf"]
        buckets = list(zip(bounds, accumulate(value.counts), strict=True))
        histogram.add_metric([model], buckets=buckets, sum_value=value.total)
        return histogram
    family_type = CounterMetricFamily if kind == "counter" else GaugeMetricFamily
    if isinstance(value, dict):
        labelled = family_type(name, text, labels=["model_name", label or ""])
        for key, count in value.items():
            labelled.add_metric([model, key], count)
        return labelled
    single = family_type(name, text, labels=["model_name"])
    single.add_metric([model], value)
    return single


def _http(stats: EngineStats) -> Iterator[Family]:
    replies: Counter[tuple[str, str]] = Counter()
    disconnects = 0.0
    for counters in stats.clients.values():
        for flat, count in counters.items():
            match split(flat):
                case ("replies", route, status):
                    replies[route, status] += int(count)
                case ("disconnects",):
                    disconnects += count
    family = CounterMetricFamily(
        names.HTTP_REPLIES, "HTTP replies, by route and status. Unit: replies.", labels=["route", "status"]
    )
    for (route, status), n in sorted(replies.items()):
        family.add_metric([route, status], n)
    yield family
    yield CounterMetricFamily(
        names.HTTP_DISCONNECTS,
        "Clients that left before their reply was whole. Unit: clients.",
        value=disconnects,
    )


def _info(name: str, text: str, labels: dict[str, str]) -> Family:
    family = GaugeMetricFamily(name, text, labels=list(labels))
    family.add_metric(list(labels.values()), 1)
    return family
