"""Metrics as Prometheus reads them, under names that do not change."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from serving import Running
from test_bad_input import TEXT
from test_wire import GET, HEAD

from sailfish.base.config import ServeConfig

Start = Callable[..., Running]
FROZEN = Path(__file__).parents[1] / "house" / "metric_names.txt"


def scrape(running: Running) -> dict[str, Metric]:
    """Return the families of one scrape by name."""
    with running.client() as client:
        reply = client.get("/metrics")
    assert reply.headers["content-type"].startswith("text/plain; version=0.0.4")
    return {family.name: family for family in text_string_to_metric_families(reply.text)}


def value(family: Metric, **labels: str) -> float:
    """Return the one sample with these labels."""
    (found,) = [s.value for s in family.samples if labels.items() <= s.labels.items()]
    return found


def test_the_metric_names_are_the_frozen_ones(start: Start) -> None:
    families = scrape(start())
    found = [f"{name} {family.type}" for name, family in sorted(families.items())]
    assert found == FROZEN.read_text().splitlines()


def test_vllms_names_are_behind_a_switch(start: Start) -> None:
    families = scrape(start(config=ServeConfig(vllm_metrics=False)))
    assert families and all(name.startswith("sailfish_") for name in families)


def test_figures_of_the_engine_are_exported_under_both_names(start: Start) -> None:
    families = scrape(start())
    for name in ("sailfish_running_sequences", "vllm:num_requests_running"):
        assert value(families[name], model_name="fake") == 2
    assert value(families["vllm:kv_cache_usage_perc"]) == 0.25
    assert value(families["vllm:request_success"], finished_reason="stop") == 3
    assert value(families["vllm:cache_config_info"], block_size="16", num_gpu_blocks="64") == 1
    histogram = families["vllm:time_to_first_token_seconds"]
    counts = {s.labels.get("le"): s.value for s in histogram.samples if s.name.endswith("_bucket")}
    assert (counts["0.01"], counts["0.025"], counts["+Inf"]) == (0, 1, 1)


def test_replies_are_counted_by_route_never_by_path(start: Start) -> None:
    running = start()
    with running.client() as client:
        client.post("/v1/completions", json=TEXT)
        client.post("/v1/completions", json={})
        for i in range(3):
            client.get(f"/made/up/{i}")
            client.get(f"/v1/models/made-up-{i}")
    running.engine.reports["api-other"] = {"replies /v1/completions 200": 5.0, "disconnects": 2.0}
    families = scrape(running)
    replies = families["sailfish_http_replies"]
    assert value(replies, route="/v1/completions", status="200") == 6
    assert value(replies, route="/v1/completions", status="400") == 1
    assert value(replies, route="other", status="404") == 3
    assert value(replies, route="/v1/models/{model}", status="404") == 3
    assert value(families["sailfish_http_disconnects"]) == 2
    assert all("made" not in str(sample.labels) for sample in replies.samples)


def test_what_the_protocol_refuses_is_counted_once(start: Start) -> None:
    running = start(header_read_s=0.5)
    running.raw(GET + b"a:\r\n" * 200 + b"\r\n")
    running.raw(b"\x16\x03\x01\x02")
    running.raw(HEAD + b"Content-Length: 1073741824\r\n\r\n")
    running.raw(b"GET /livez HTT")
    too_large = b"10000\r\n" + b" " * 65_536 + b"\r\n"
    running.raw(HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + too_large * 129)
    families = scrape(running)
    replies = families["sailfish_http_replies"]
    found = {s.labels["status"]: s.value for s in replies.samples if s.labels["route"] == "other"}
    assert found == {"431": 1, "400": 1, "413": 2, "408": 1}
    assert not any(sample.labels["status"] == "499" for sample in replies.samples)
    assert value(families["sailfish_http_disconnects"]) == 0
