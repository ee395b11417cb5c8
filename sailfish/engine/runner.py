"""Run one planned step on the device: rows in, drawn tokens out. Nothing here waits for the device."""

from __future__ import annotations

import torch
from torch import Tensor

from sailfish.engine.api import TokenLogprob, TopLogprob
from sailfish.engine.graphs import StepGraphs
from sailfish.engine.packing import Batch
from sailfish.engine.sampler import sample, top_logprobs
from sailfish.engine.spans import CapturedSpans
from sailfish.engine.step import RowRun, StepPlan, StepResult
from sailfish.engine.table import DeviceTable
from sailfish.engine.transfer import Pending, download, upload
from sailfish.kernels.cuda.sampling import pick
from sailfish.kernels.rows import StepTensors
from sailfish.kernels.step_words import StepLayout
from sailfish.models.decoder import Decoder, KvCache, StepInputs
from sailfish.plan.memory import SCORED_ROWS


class _On:
    """Make a stream of the current device the current one; None: change nothing.

    `torch.cuda.stream` looks up both streams' devices too, in every step.
    """

    __slots__ = ("_before", "_stream")

    def __init__(self, stream: torch.cuda.Stream | None) -> None:
        self._stream = stream

    def __enter__(self) -> None:
        if self._stream is not None:
            self._before = torch.cuda.current_stream()
            torch.cuda.set_stream(self._stream)

    def __exit__(self, *_: object) -> None:
        if self._stream is not None:
            torch.cuda.set_stream(self._before)


class Step:
    """A launched step; `wait` and `result` wait for its tokens."""

    def __init__(
        self,
        plan: StepPlan,
        draws: Pending,
        logprobs: _DrawnLogprobs | None,
        prompt_logprobs: list[list[_Logprobs]],
    ) -> None:
        """Take what is on its way to the host; `prompt_logprobs`: of each span."""
        self._plan = plan
        self._draws = draws
        self._logprobs = logprobs
        self._prompt_logprobs = prompt_logprobs

    def wait(self) -> None:
        """Wait for the device."""
        self._draws.wait()

    def result(self) -> StepResult:
        """Wait for the device and return the step's tokens as plain values."""
        token_S, finite_S = self._draws.wait().T
        return StepResult(
            step_id=self._plan.step_id,
            token_ids=token_S.tolist(),
            finite=[True] * len(finite_S) if finite_S.all() else finite_S.astype(bool).tolist(),
            logprobs=[None] * len(token_S) if self._logprobs is None else self._logprobs.rows(len(token_S)),
            prompt_logprobs=[
                [row for part in parts for row in part.rows()] if parts else []
                for parts in self._prompt_logprobs
            ],
        )


class Runner:
    """One decoder with its KV cache and device table."""

    def __init__(
        self, decoder: Decoder, kv: KvCache, table: DeviceTable, graphs: StepGraphs | None = None
    ) -> None:
        """Take what a step needs; `graphs` are captured by `capture`."""
        self._decoder = decoder
        self._kv = kv
        self._table = table
        self._graphs = graphs or StepGraphs(())
        most_tokens = self._graphs.most_tokens
        self._inputs_3T = torch.zeros(3, most_tokens, dtype=torch.int64, device=table.device)
        """What captured steps with prompts read: tokens, positions, slots."""
        self._spans = CapturedSpans(
            table.rows.block_RW,
            most_tokens=most_tokens,
            context_tokens=table.context_tokens,
            head_dim=kv.layers[0].k_NPKE.shape[-1],
        )
        self._stream: torch.cuda.Stream | None = None
        if table.device.type == "cuda":
            self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            self._stream.wait_stream(torch.cuda.current_stream())

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> Step:
        """Launch one step: send its differences, run its tokens, draw for the runs that sample."""
        table, batch = self._table, Batch.of(plan)
        table.note(plan.starts)
        with _On(self._stream):
            n_runs = self._graphs.fitting(plan.n_runs) if batch.is_decode else None
            if n_runs is None:
                return self._run(plan, batch)
            table.send(plan, batch, pad_to=n_runs)
            wanted = self._wanted(self._graphs.replay(n_runs), batch)
            # One token of a prompt predicts no other of it.
            return self._launched(plan, batch, wanted, [[]] * len(plan.spans))

    @torch.inference_mode()
    def capture(self) -> None:
        """Capture the planned decode steps; nothing else may run meanwhile."""
        nothing = StepPlan(0, [], [], [])
        with torch.cuda.stream(self._stream):
            self._table.send(nothing, Batch.of(nothing), pad_to=self._graphs.most_runs)
            self._inputs_3T[2] = -1  # no step's cache is written meanwhile
            self._graphs.capture(self._decode, self._forward_alone)

    def launches(self) -> dict[int, dict[str, int]]:
        """Return how often a captured decode of up to so many runs launches each kernel."""
        return self._graphs.launches()

    def _decode(self, n_runs: int) -> Tensor:
        """Run a decode as it is captured, of `n_runs` rows, whatever their lengths will be; return logits_SV.

        The logits are as the model made them: what a draw changes is a copy.
        """
        table = self._table
        layout = StepLayout.decode(n_runs)
        bounds = (table.context_tokens,) * n_runs
        inputs, made = table.inputs(layout, tuple(range(n_runs + 1)), bounds, n_runs)
        logits_SV = self._logits(self._decoder.forward(inputs, self._kv))
        changed_SV = logits_SV.clone() if logits_SV.dtype == torch.float32 else logits_SV
        table.append(made, *self._draw(changed_SV, made, None))
        return logits_SV

    def _forward_alone(self, n_tokens: int) -> Tensor:
        """Run a forward pass as it is captured, of `n_tokens` tokens; return hidden_TD."""
        token_T, position_T, slot_T = self._inputs_3T[:, :n_tokens]
        span = self._spans.span(n_tokens)
        inputs = StepInputs(token_T=token_T, position_T=position_T, slot_T=slot_T, span=span)
        return self._decoder.forward(inputs, self._kv)

    def _run(self, plan: StepPlan, batch: Batch) -> Step:
        """Run a step of any kind, its forward pass as it is captured, or else launch by launch."""
        table = self._table
        ends = tuple(batch.query_start_B1.tolist())
        kv_len = tuple((batch.start_B + batch.count_B).tolist())
        n_tokens = None if batch.is_decode else self._graphs.fitting_chunk(ends[-1])
        layout = table.send(plan, batch, pad_to=n_tokens or 0)
        into_3T = None if n_tokens is None else self._inputs_3T[:, : layout.n_tokens]
        inputs, made = table.inputs(layout, ends, kv_len, batch.n_single, into_3T)
        if n_tokens is None:
            hidden_TD = self._decoder.forward(inputs, self._kv)
        else:
            self._spans.send(batch, kv_len, ends)
            hidden_TD = self._graphs.replay_chunk(n_tokens)
        n_top = [table.sampling_of(run.row).prompt_logprobs for run in plan.spans]
        prompt_logprobs = [
            [] if n is None else self._prompt_logprobs(hidden_TD[ends[i] : ends[i + 1]], run, n)
            for i, (run, n) in enumerate(zip(plan.spans, n_top, strict=True), plan.n_decodes)
        ]
        if not batch.samples_B.any():
            return self._launched(plan, batch, None, prompt_logprobs)
        logits_SV = self._logits(hidden_TD if made.at_S is None else hidden_TD[made.at_S])
        wanted = self._wanted(logits_SV, batch)
        table.append(made, *self._draw(logits_SV, made, batch))
        return self._launched(plan, batch, wanted, prompt_logprobs)

    def _launched(
        self,
        plan: StepPlan,
        batch: Batch,
        wanted: tuple[list[int], Tensor] | None,
        prompt_logprobs: list[list[_Logprobs]],
    ) -> Step:
        """Send the draws to the host, with the log-probabilities of those that want them."""
        logprobs = None if wanted is None else self._drawn_logprobs(batch, *wanted)
        # The draws go last: who waits for them finds the log-probabilities on the host.
        return Step(plan, self._table.take_draws(len(batch.sampled_row_S)), logprobs, prompt_logprobs)

    def _drawn_logprobs(self, batch: Batch, at: list[int], logits_bV: Tensor) -> _DrawnLogprobs:
        table = self._table
        n_top = [table.sampling_of(row).logprobs or 0 for row in batch.sampled_row_S[at].tolist()]
        return _DrawnLogprobs(at, n_top, logits_bV, table.drawn(upload(at, table.device)))

    def _wanted(self, logits_SV: Tensor, batch: Batch) -> tuple[list[int], Tensor] | None:
        """Return which samples want log-probabilities, and a copy of their logits in float32."""
        at = self._table.wanting_logprobs(batch)
        if not at:
            return None
        return at, logits_SV[upload(at, logits_SV.device)].to(torch.float32)

    def _logits(self, hidden_SD: Tensor) -> Tensor:
        """Return logits_SV in a dtype that `_draw` takes."""
        logits_SV = self._decoder.logits(hidden_SD)
        return logits_SV if logits_SV.is_cuda else logits_SV.float()

    def _draw(self, logits_SV: Tensor, made: StepTensors, batch: Batch | None) -> tuple[Tensor, Tensor]:
        """Return (token_S int64, finite_S bool); only a CPU needs `batch`. May mutate logits_SV."""
        table = self._table
        if logits_SV.is_cuda:
            return pick(logits_SV, made.row_S, made.length_S, table.rows)
        assert batch is not None, "steps are captured on a GPU only"
        rows: list[int] = batch.sampled_row_S.tolist()
        return sample(
            logits_SV,
            made.row_S,
            made.length_S,
            table.rows,
            [table.sampling_of(row) for row in rows],
            rows,
            (batch.start_B + batch.count_B)[batch.samples_B].tolist(),
            [table.n_prompt[row] for row in rows],
        )

    def _prompt_logprobs(self, hidden_QD: Tensor, run: RowRun, n_top: int) -> list[_Logprobs]:
        """Score the prompt tokens that this run's positions predict: start + 1 .. start + count."""
        n_scored = max(0, min(run.start + run.count, self._table.n_prompt[run.row] - 1) - run.start)
        token_Q = self._table.rows.token_RC[run.row, run.start + 1 : run.start + 1 + n_scored].to(torch.int64)
        return [
            _Logprobs(
                self._decoder.logits(hidden_QD[i : min(i + SCORED_ROWS, n_scored)]).float(),
                token_Q[i : i + SCORED_ROWS],
                n_top,
            )
            for i in range(0, n_scored, SCORED_ROWS)
        ]


class _DrawnLogprobs:
    """Log-probabilities of some of a step's draws on their way to the host."""

    def __init__(self, at: list[int], n_top: list[int], logits_bV: Tensor, token_b: Tensor) -> None:
        """Take the samples they are of, how many alternatives each wants, and their logits and tokens."""
        self._at = at
        self._n_top = n_top
        self._parts = [
            _Logprobs(logits_bV[i : i + SCORED_ROWS], token_b[i : i + SCORED_ROWS], max(n_top))
            for i in range(0, len(at), SCORED_ROWS)
        ]

    def rows(self, n_samples: int) -> list[TokenLogprob | None]:
        """Return one entry a sample; the step must be done."""
        found: list[TokenLogprob | None] = [None] * n_samples
        scored = [row for part in self._parts for row in part.rows()]
        for at, n_top, row in zip(self._at, self._n_top, scored, strict=True):
            found[at] = TokenLogprob(row.token_id, row.logprob, row.top[:n_top])
        return found


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
