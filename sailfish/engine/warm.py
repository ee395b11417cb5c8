"""Run steps at the largest shapes that the plan allows, so that nothing larger can come after READY."""

from __future__ import annotations

from sailfish.engine.api import MAX_LOGPROBS
from sailfish.engine.runner import Runner
from sailfish.engine.step import RowRun, RowSampling, RowStart, StepPlan
from sailfish.plan.types import Plan


def warm_up(runner: Runner, plan: Plan, vocab_size: int) -> None:
    """Run the largest prefill, the largest decode and the largest mixed step, with every sampling stage on.

    Rows share the first block and hold zeros: what they compute is never read.
    """
    n_rows = min(plan.max_sequences, plan.step_tokens)
    last = plan.context_tokens - 1
    everything = _everything(vocab_size)
    starts = [RowStart(row, [0], plan.context_tokens, [0], everything) for row in range(n_rows)]
    prefills: list[RowRun] = []
    left = plan.step_tokens
    for row in range(n_rows):
        count = min(left, last)
        if count > 0:
            prefills.append(RowRun(row, last - count, count, True))
        left -= count
    # Longer ones could only share blocks, and attention's workspace is bounded whatever the length.
    depth = min(last, plan.n_blocks * plan.page_tokens // n_rows)
    decodes = [RowRun(row, depth, 1, True) for row in range(n_rows)]
    spare = min(plan.step_tokens - n_rows + 1, last)
    mixed = [*decodes[:-1], RowRun(n_rows - 1, last - spare, spare, True)]
    runner.execute(StepPlan(0, starts, [], prefills)).result()
    runner.execute(StepPlan(0, [], [], decodes)).result()
    runner.execute(StepPlan(0, [], [], mixed)).result()


def _everything(vocab_size: int) -> RowSampling:
    return RowSampling(
        temperature=1.0,
        top_k=max(vocab_size - 1, 1),
        top_p=0.99,
        min_p=0.001,
        repetition_penalty=1.1,
        presence_penalty=0.1,
        frequency_penalty=0.1,
        seed=0,
        min_tokens=1 << 30,
        stop_token_ids=(0,),
        logit_bias=((0, 1.0),),
        logprobs=min(MAX_LOGPROBS, vocab_size),
        prompt_logprobs=min(MAX_LOGPROBS, vocab_size),
    )
