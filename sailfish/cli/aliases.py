"""Spellings that users of other engines type by reflex, and what they mean here."""

from __future__ import annotations

from sailfish.base.errors import ConfigError

ALIASES = {
    "--alias": "--served-model-name",
    "--api-key-file": "--api-keys-file",
    "--api-keys": "--api-key",
    "--context": "--ctx",
    "--ctx-size": "--ctx",
    "--enable-prefix-caching": "--prefix-cache",
    "--max-concurrency": "--concurrency",
    "--max-model-len": "--ctx",
    "--max-num-batched-tokens": "--step-tokens",
    "--max-num-seqs": "--concurrency",
    "--max-running-requests": "--concurrency",
    "--max-total-tokens": "--ctx",
    "--model-name": "--served-model-name",
    "--block-size": "--page-tokens",
    "--page-size": "--page-tokens",
    "--kv-cache-dtype": "--kv-dtype",
    "--kv-cache-memory-bytes": "--kv-memory",
    "--max-new-tokens": "--max-tokens",
    "--n-predict": "--max-tokens",
    "--chunked-prefill-size": "--step-tokens",
    "--no-enable-prefix-caching": "--no-prefix-cache",
    "--disable-radix-cache": "--no-prefix-cache",
    "--enforce-eager": "--no-cuda-graphs",
    "--disable-cuda-graph": "--no-cuda-graphs",
    "--parallel": "--concurrency",
    "--temp": "--temperature",
}
"""Foreign spelling -> ours. Both `--x value` and `--x=value` are understood."""

REFUSED = {
    "--trust-remote-code": "Sailfish never runs code that comes with a checkpoint; drop the flag",
    "--gpu-memory-utilization": "say how much memory instead: --memory 60GiB",
    "--mem-fraction-static": "say how much memory instead: --memory 60GiB",
    "--tensor-parallel-size": "this version runs on one device; drop the flag",
    "--quantization": "this version runs dense weights; drop the flag",
}
"""Foreign spelling -> why it does not exist here, and what to do."""


def translate(argv: list[str]) -> list[str]:
    """Return the arguments in our spelling; everything after `--` is left alone.

    Raises ConfigError for a spelling whose meaning does not exist here.
    """
    end = argv.index("--") if "--" in argv else len(argv)
    return [_word(word) for word in argv[:end]] + argv[end:]


def _word(word: str) -> str:
    spelling, equals, value = word.partition("=")
    if spelling in REFUSED:
        raise ConfigError(f"{spelling} is not a flag of Sailfish", hint=REFUSED[spelling])
    return ALIASES.get(spelling, spelling) + equals + value
