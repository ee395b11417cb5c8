"""Every metric there is: name, kind, unit, meaning, and where its figure comes from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from sailfish.engine.api import EngineStats, Histogram

Value = float | dict[str, int] | Histogram


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """One metric of the engine. Counters are exported with `_total` behind their name."""

    name: str
    kind: Literal["gauge", "counter", "histogram"]
    unit: str
    help: str
    read: Callable[[EngineStats], Value]
    label: str | None = None
    """Label whose values are the keys of a dict."""
    vllm: str | None = None
    """vLLM's name for the same figure."""
    vllm_label: str | None = None


def _used_frac(stats: EngineStats) -> float:
    return stats.blocks_used / stats.blocks_total if stats.blocks_total else 0.0


METRICS: tuple[Metric, ...] = (
    Metric(
        name="sailfish_running_sequences", kind="gauge", unit="sequences",
        help="Sequences in the running batch.",
        read=lambda s: s.running, vllm="vllm:num_requests_running",
    ),
    Metric(
        name="sailfish_waiting_sequences", kind="gauge", unit="sequences",
        help="Sequences that wait to run.",
        read=lambda s: s.waiting, vllm="vllm:num_requests_waiting",
    ),
    Metric(
        name="sailfish_kv_blocks", kind="gauge", unit="blocks",
        help="KV blocks there are.", read=lambda s: s.blocks_total,
    ),
    Metric(
        name="sailfish_kv_used_blocks", kind="gauge", unit="blocks",
        help="KV blocks that sequences hold.", read=lambda s: s.blocks_used,
    ),
    Metric(
        name="sailfish_kv_cached_blocks", kind="gauge", unit="blocks",
        help="KV blocks that no sequence holds but that keep a reusable prefix.",
        read=lambda s: s.blocks_cached,
    ),
    Metric(
        name="sailfish_kv_used_frac", kind="gauge", unit="fraction",
        help="Part of the KV blocks that sequences hold.",
        read=_used_frac, vllm="vllm:kv_cache_usage_perc",
    ),
    Metric(
        name="sailfish_draining", kind="gauge", unit="0 or 1",
        help="Whether the engine is draining.", read=lambda s: float(s.draining),
    ),
    Metric(
        name="sailfish_device_reserved_bytes", kind="gauge", unit="bytes",
        help="Device memory held (CPU: resident set of the engine process).",
        read=lambda s: s.reserved_bytes,
    ),
    Metric(
        name="sailfish_steps", kind="counter", unit="steps",
        help="Steps run.", read=lambda s: s.steps,
    ),
    Metric(
        name="sailfish_step_errors", kind="counter", unit="steps",
        help="Steps that failed.", read=lambda s: s.step_errors,
    ),
    Metric(
        name="sailfish_prompt_tokens", kind="counter", unit="tokens",
        help="Prompt tokens of accepted sequences.",
        read=lambda s: s.prompt_tokens, vllm="vllm:prompt_tokens",
    ),
    Metric(
        name="sailfish_generated_tokens", kind="counter", unit="tokens",
        help="Tokens generated.", read=lambda s: s.generated_tokens, vllm="vllm:generation_tokens",
    ),
    Metric(
        name="sailfish_prefix_query_tokens", kind="counter", unit="tokens",
        help="Prompt tokens looked up in the prefix cache.",
        read=lambda s: s.prefix_query_tokens, vllm="vllm:prefix_cache_queries",
    ),
    Metric(
        name="sailfish_prefix_hit_tokens", kind="counter", unit="tokens",
        help="Prompt tokens found in the prefix cache.",
        read=lambda s: s.prefix_hit_tokens, vllm="vllm:prefix_cache_hits",
    ),
    Metric(
        name="sailfish_preemptions", kind="counter", unit="sequences",
        help="Sequences put back to wait because blocks ran out.",
        read=lambda s: s.preemptions, vllm="vllm:num_preemptions",
    ),
    Metric(
        name="sailfish_finished_sequences", kind="counter", unit="sequences", label="reason",
        help="Sequences ended, by reason.", read=lambda s: s.finished,
        vllm="vllm:request_success", vllm_label="finished_reason",
    ),
    Metric(
        name="sailfish_refused_sequences", kind="counter", unit="sequences", label="code",
        help="Sequences refused at admission, by error code.", read=lambda s: s.refused,
    ),
    Metric(
        name="sailfish_time_to_first_token_seconds", kind="histogram", unit="s",
        help="From arrival to the first token.",
        read=lambda s: s.time_to_first_token_s, vllm="vllm:time_to_first_token_seconds",
    ),
    Metric(
        name="sailfish_inter_token_seconds", kind="histogram", unit="s",
        help="Between two tokens of a sequence.",
        read=lambda s: s.inter_token_s, vllm="vllm:inter_token_latency_seconds",
    ),
    Metric(
        name="sailfish_end_to_end_seconds", kind="histogram", unit="s",
        help="From arrival to the last token.",
        read=lambda s: s.end_to_end_s, vllm="vllm:e2e_request_latency_seconds",
    ),
    Metric(
        name="sailfish_queue_seconds", kind="histogram", unit="s",
        help="From arrival to the first step.",
        read=lambda s: s.queue_s, vllm="vllm:request_queue_time_seconds",
    ),
    Metric(
        name="sailfish_prefill_seconds", kind="histogram", unit="s",
        help="From the first step to the first token.",
        read=lambda s: s.prefill_s, vllm="vllm:request_prefill_time_seconds",
    ),
    Metric(
        name="sailfish_decode_seconds", kind="histogram", unit="s",
        help="From the first token to the last.",
        read=lambda s: s.decode_s, vllm="vllm:request_decode_time_seconds",
    ),
    Metric(
        name="sailfish_time_per_output_token_seconds", kind="histogram", unit="s",
        help="Mean time between the tokens of a sequence.",
        read=lambda s: s.time_per_output_token_s, vllm="vllm:request_time_per_output_token_seconds",
    ),
    Metric(
        name="sailfish_step_tokens", kind="histogram", unit="tokens",
        help="Tokens computed in a step.", read=lambda s: s.step_tokens, vllm="vllm:iteration_tokens_total",
    ),
)  # fmt: skip

HTTP_REPLIES = "sailfish_http_replies"
"""Counter of HTTP replies, labels `route` and `status`; all API processes together."""
HTTP_DISCONNECTS = "sailfish_http_disconnects"
"""Counter of clients that left before their reply was whole."""
ENGINE_INFO = "sailfish_engine_info"
"""Always 1; labels say what the engine is."""
CACHE_CONFIG_INFO = "vllm:cache_config_info"
"""Always 1; labels as the gateway inference extension reads them."""
