"""What a user may set. `None` means "auto": the plan answers it, with a reason."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """How an engine should run."""

    device: str | None = None
    """"cpu" or "cuda"."""
    dtype: str | None = None
    """"float32" or "bfloat16", of weights and activations."""
    weights: str | None = None
    """Of attention and MLP: "int4", "int8", "fp8", or "bfloat16" or "float32" as the activations."""
    head: str | None = None
    """Of the output projection: "plain" (as dtype), "int4", "int8" or "fp8"."""
    embedding: str | None = None
    """"plain" (as dtype) or "int8"."""
    weight_group: int | None = None
    """Inputs that share a scale in int4 weights: 32, 64 or 128."""
    context_tokens: int | None = None
    """Longest prompt plus answer, in tokens."""
    max_sequences: int | None = None
    """Sequences that run at once."""
    step_tokens: int | None = None
    """Token budget of one step, shared by prefill chunks and decodes."""
    mixed_tokens: int | None = None
    """Token budget of a step in which sequences decode, who wait for its prompts; at most step_tokens."""
    max_queue: int | None = None
    """Requests that may wait before new ones are refused."""
    memory_bytes: int | None = None
    """Upper bound on all memory the engine takes on its device, in bytes."""
    kv_bytes: int | None = None
    """Memory for KV blocks, in bytes."""
    page_tokens: int | None = None
    """Tokens per KV block."""
    kv_dtype: str | None = None
    """Of the KV cache: "int8" or "fp8" with a scale for each token and head; the default is as dtype."""
    prefix_cache: bool = True
    """Reuse the KV blocks of equal prompt beginnings."""
    cuda_graphs: bool = True
    """Capture decode steps on CUDA, so that each is one launch."""
    lag: int | None = None
    """0 or 1: steps planned before the previous step's tokens are known."""
    strict: bool = False
    """Make every downgrade an error."""

    def overruled_by(self, asked: EngineConfig) -> EngineConfig:
        """Return these settings with all that `asked` sets; a switch that either one turned is turned."""
        switches = ("prefix_cache", "cuda_graphs", "strict")
        set_now = {
            name: value
            for name in self.__slots__
            if name not in switches and (value := getattr(asked, name)) is not None
        }
        return replace(
            self,
            prefix_cache=self.prefix_cache and asked.prefix_cache,
            cuda_graphs=self.cuda_graphs and asked.cuda_graphs,
            strict=self.strict or asked.strict,
            **set_now,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeConfig:
    """How the API listens."""

    host: str = "127.0.0.1"
    """Address to bind."""
    port: int = 8000
    """TCP port; 0 takes a free one."""
    served_model_name: str | None = None
    """Name that requests use for the model; the default is the directory's name."""
    api_keys_file: str | None = None
    """File with one `name:key` or `key` a line; `#` starts a comment."""
    api_keys: str | None = None
    """Comma-separated keys, meant for the environment."""
    api_processes: int = 1
    """Processes that speak HTTP to clients."""
    drain_s: float = 30.0
    """Seconds that running requests may take to end after SIGTERM."""
    cors_origins: str | None = None
    """Comma-separated origins allowed by CORS; none by default."""
    vllm_metrics: bool = True
    """Export vLLM's metric names beside ours."""
