"""How long a new process takes from its start to the first token of an engine."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import msgspec

from sailfish.base.config import EngineConfig
from sailfish.base.errors import EngineError
from sailfish.engine.api import SamplingParams
from sailfish.engine.sync import Engine

_SAID = b"token"
_PROMPT_TOKENS = 16


def seconds(engine_dir: Path, config: EngineConfig) -> float:
    """Return the time from the start of a new process to the first token of its engine."""
    start_s = time.perf_counter()
    command = [sys.executable, "-m", "sailfish.bench.first_token", str(engine_dir)]
    with subprocess.Popen(
        [*command, msgspec.json.encode(config).decode()], stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        said = process.stdout.readline()
        total_s = time.perf_counter() - start_s
    if said.strip() != _SAID:
        raise EngineError(f"the engine in {engine_dir} did not give a token", hint="see what it wrote above")
    return total_s


def main() -> None:
    """Start the engine of the first argument with the configuration of the second, and ask it."""
    config = msgspec.json.decode(sys.argv[2], type=EngineConfig)
    with Engine(sys.argv[1], config=config) as engine:
        prompt_ids = list(range(1, 1 + _PROMPT_TOKENS))
        engine.generate(prompt_ids, SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True))
        sys.stdout.buffer.write(_SAID + b"\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
