"""Run one planned step on the device: rows in, drawn tokens out. Nothing here waits for the device."""

from __future__ import annotations

import torch
from torch import Tensor

from sailfish.engine.api import TokenLogprob, TopLogprob
from sailfish.engine.sampler import sample, top_logprobs
from sailfish.engine.step import RowRun, RowSampling, StepPlan, StepResult
from sailfish.engine.table import DeviceTable
from sailfish.engine.transfer import download, upload
from sailfish.models.decoder import Decoder, KvCache
from sailfish.plan.memory import SCORED_ROWS


class Step:
    """A launched step; `result` waits for its tokens."""

    def __init__(
        self,
        plan: StepPlan,
        token_S: Tensor,
        finite_S: Tensor,
        logprobs: list[_Logprobs | None],
        prompt_logprobs: list[list[_Logprobs]],
    ) -> None:
        self._plan = plan
        self._logprobs = logprobs
        self._prompt_logprobs = prompt_logprobs
        self._token_S = download(token_S)
        self._finite_S = download(finite_S)
        self._done = torch.cuda.Event() if token_S.is_cuda else None  # type: ignore[no-untyped-call]
        if self._done is not None:
            self._done.record()

    def result(self) -> StepResult:
        """Wait for the device and return the step's tokens as plain values."""
        if self._done is not None:
            self._done.synchronize()
        return StepResult(
            step_id=self._plan.step_id,
            token_ids=self._token_S.tolist(),
            finite=self._finite_S.tolist(),
            logprobs=[None if p is None else p.rows()[0] for p in self._logprobs],
            prompt_logprobs=[
                [row for part in parts for row in part.rows()] for parts in self._prompt_logprobs
            ],
        )


class Runner:
    """One decoder with its KV cache and device table."""

    def __init__(self, decoder: Decoder, kv: KvCache, table: DeviceTable) -> None:
        self._decoder = decoder
        self._kv = kv
        self._table = table

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> Step:
        """Launch one step: apply its differences, run its tokens, draw for the runs that sample."""
        table = self._table
        table.apply(plan)
        inputs = table.inputs(plan.runs)
        hidden_TD = self._decoder.forward(inputs, self._kv)
        ends = inputs.span.query_start
        prompt_logprobs = [
            self._prompt_logprobs(hidden_TD[ends[i] : ends[i + 1]], run) for i, run in enumerate(plan.runs)
        ]
        sampled = [(run, ends[i + 1] - 1) for i, run in enumerate(plan.runs) if run.samples]
        if not sampled:
            nothing = torch.zeros(0, dtype=torch.int64, device=table.device)
            return Step(plan, nothing, nothing.to(torch.bool), [], prompt_logprobs)
        runs = [run for run, _ in sampled]
        rows = [self._sampling(run) for run in runs]
        at_S = upload([at for _, at in sampled], table.device)
        row_S = upload([run.row for run in runs], table.device)
        length_S = inputs.position_T[at_S] + 1
        logits_SV = self._decoder.logits(hidden_TD[at_S])
        raw = {i: logits_SV[i : i + 1].clone() for i, row in enumerate(rows) if row.logprobs is not None}
        token_S, finite_S = sample(
            logits_SV,
            row_S,
            length_S,
            table.token_RC,
            table.sampling,
            rows,
            [run.row for run in runs],
            [run.start + run.count for run in runs],
            [table.n_prompt[run.row] for run in runs],
        )
        table.append_tokens(row_S, length_S, token_S)
        logprobs = [
            _Logprobs(raw[i], token_S[i : i + 1], row.logprobs) if row.logprobs is not None else None
            for i, row in enumerate(rows)
        ]
        return Step(plan, token_S, finite_S, logprobs, prompt_logprobs)

    def _sampling(self, run: RowRun) -> RowSampling:
        sampling = self._table.row_sampling[run.row]
        assert sampling is not None, f"row {run.row} runs but was never started"
        return sampling

    def _prompt_logprobs(self, hidden_QD: Tensor, run: RowRun) -> list[_Logprobs]:
        """Score the prompt tokens that this run's positions predict: start + 1 .. start + count."""
        n_top = self._sampling(run).prompt_logprobs
        n_scored = min(run.start + run.count, self._table.n_prompt[run.row] - 1) - run.start
        if n_top is None or n_scored <= 0:
            return []
        token_Q = self._table.token_RC[run.row, run.start + 1 : run.start + 1 + n_scored].to(torch.int64)
        return [
            _Logprobs(
                self._decoder.logits(hidden_QD[i : min(i + SCORED_ROWS, n_scored)]),
                token_Q[i : i + SCORED_ROWS],
                n_top,
            )
            for i in range(0, n_scored, SCORED_ROWS)
        ]


class _Logprobs:
    """Log-probabilities of some rows on their way to the host."""

    def __init__(self, logits_bV: Tensor, token_b: Tensor, n_top: int) -> None:
        chosen_b, top_bk, top_id_bk = top_logprobs(logits_bV, token_b, n_top)
        self._parts = [download(t) for t in (token_b, chosen_b, top_bk, top_id_bk)]

    def rows(self) -> list[TokenLogprob]:
        """Return one entry a row; the step must be done."""
        token_b, chosen_b, top_bk, top_id_bk = (part.tolist() for part in self._parts)
        return [
            TokenLogprob(
                token_id,
                chosen,
                [TopLogprob(i, p) for i, p in zip(top_ids, top, strict=True)],
            )
            for token_id, chosen, top, top_ids in zip(token_b, chosen_b, top_bk, top_id_bk, strict=True)
        ]
