"""An engine process without a model: every step takes the same time and draws tokens at random.

What it shares with a real one is all but the runner: socket, frames, loop, scheduler. So it shows what the
API side can carry, on a machine whose model would be far too slow for it.
"""

from __future__ import annotations

import argparse
import os
import random
import time
from pathlib import Path

from sailfish.artifact.reader import Artifact
from sailfish.base import log
from sailfish.bench.child import serve
from sailfish.engine.api import EngineInfo
from sailfish.engine.limits import SchedulerLimits
from sailfish.engine.scheduler import Scheduler
from sailfish.engine.step import StepPlan, StepResult

_PAGE_TOKENS = 64
_STEP_TOKENS = 8192
_POOL = 65536


class _Paced:
    """A step that ends when the clock says so."""

    def __init__(self, plan: StepPlan, ends_s: float, token_ids: list[int]) -> None:
        self.ends_s = ends_s
        self._plan, self._token_ids = plan, token_ids

    def wait(self) -> None:
        """Wait for the step's end."""
        time.sleep(max(0.0, self.ends_s - time.monotonic()))

    def result(self) -> StepResult:
        """Wait for the step's end and return its tokens."""
        self.wait()
        n = len(self._token_ids)
        return StepResult(
            self._plan.step_id, self._token_ids, [True] * n, [None] * n, [[]] * len(self._plan.spans)
        )


class PacedRunner:
    """Runs steps one after the other, each `step_s` long."""

    def __init__(self, step_s: float, vocab_size: int) -> None:
        self._step_s = step_s
        self._pool = random.Random(0).choices(range(vocab_size), k=_POOL)
        self._at = 0
        self._last_end_s = 0.0

    def execute(self, plan: StepPlan) -> _Paced:
        """Begin a step when the one before it has ended."""
        n = plan.n_decodes + sum(run.samples for run in plan.spans)
        self._at = (self._at + n) % (_POOL - n) if n < _POOL else 0
        self._last_end_s = max(self._last_end_s, time.monotonic()) + self._step_s
        return _Paced(plan, self._last_end_s, self._pool[self._at : self._at + n])


def main() -> None:
    """Serve on a socket until the standard input closes or a signal comes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engine", type=Path, required=True)
    parser.add_argument("--socket", type=Path, required=True)
    parser.add_argument("--sequences", type=int, required=True)
    parser.add_argument("--step-ms", type=float, required=True)
    args = parser.parse_args()
    log.configure(level="warning")
    artifact = Artifact.open(args.engine)
    model = artifact.manifest.model
    limits = SchedulerLimits(
        max_sequences=args.sequences,
        step_tokens=max(_STEP_TOKENS, args.sequences),
        context_tokens=model.context_tokens,
        max_queue=args.sequences,
        page_tokens=_PAGE_TOKENS,
        n_blocks=args.sequences * -(-model.context_tokens // _PAGE_TOKENS),
        lag=1,
    )
    info = EngineInfo(
        name=artifact.manifest.name,
        digest=artifact.digest,
        engine_dir=str(args.engine.resolve()),
        family=model.family,
        device="none",
        dtype="float32",
        vocab_size=model.vocab_size,
        context_tokens=limits.context_tokens,
        page_tokens=limits.page_tokens,
        n_blocks=limits.n_blocks,
        max_sequences=limits.max_sequences,
        max_queue=limits.max_queue,
        step_tokens=limits.step_tokens,
        prefix_cache=True,
        eos_token_ids=list(model.eos_token_ids),
        bos_token_id=model.bos_token_id,
        defaults={},
        memory=[],
        started_s=0.0,
        pid=os.getpid(),
    )
    scheduler = Scheduler(limits, engine_digest=artifact.digest, kv_dtype="float32")
    serve(args.socket, info, scheduler, PacedRunner(args.step_ms / 1e3, model.vocab_size), limits.lag)


if __name__ == "__main__":
    main()
