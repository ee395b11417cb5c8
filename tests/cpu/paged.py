"""A small driver of a decoder over a paged cache, with random blocks and random chunks."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from sailfish.artifact.reader import Artifact
from sailfish.checkpoint.hf_config import load_model_config
from sailfish.checkpoint.model_config import ModelConfig
from sailfish.checkpoint.names import tensor_specs
from sailfish.checkpoint.safetensors_reader import Checkpoint
from sailfish.kernels.choose import bind
from sailfish.kernels.contract import AttentionSpan, Ops
from sailfish.models.arena import arena_layout
from sailfish.models.decoder import Decoder, KvCache, StepInputs
from sailfish.models.layers.linear import LinearWeight
from sailfish.models.load import ARENA_DTYPES, assemble, load_weights
from sailfish.plan.formats import arena_tensors
from sailfish.plan.ops import choose_all, op_cases
from sailfish.plan.types import Dtype, WeightFormats

PAGE_TOKENS = 8
N_BLOCKS = 128


@dataclass(frozen=True)
class BytesPiece:
    """A piece of a tensor that is in memory."""

    data: bytes | memoryview
    dtype: str

    @property
    def n_bytes(self) -> int:
        return len(self.data)

    def read_into(self, buffer: memoryview, start: int) -> None:
        """Fill the buffer with the bytes from `start`."""
        buffer[:] = self.data[start : start + len(buffer)]


def load_twin_weights(
    path: Path, config: ModelConfig, dtype: Dtype = "float32", device: str = "cpu"
) -> dict[str, Tensor]:
    """Read a checkpoint's weights into one arena."""
    checkpoint = Checkpoint.open(path)
    tensors = arena_tensors(config, WeightFormats())
    _, n_bytes = arena_layout(tensors, dtype)
    pieces = {
        spec.name: [
            BytesPiece(checkpoint.bytes(source), checkpoint.tensors[source].dtype) for source in spec.sources
        ]
        for spec in tensor_specs(config)
    }
    return load_weights(tensors, pieces, torch.empty(n_bytes, dtype=torch.uint8, device=device), dtype)


def load_engine_weights(engine: Artifact, device: str = "cpu") -> dict[str, LinearWeight]:
    """Read an engine's weights into one arena of the planned size."""
    plan, model = engine.manifest.plan, engine.manifest.model
    tensors = arena_tensors(model, plan.formats)
    arena = torch.empty(plan.memory_bytes("weights"), dtype=torch.uint8, device=device)
    pieces = {tensor.name: tensor.pieces for tensor in engine.tensors()}
    return assemble(model, plan.formats, load_weights(tensors, pieces, arena, plan.dtype))


def chosen_ops(config: ModelConfig, target: str = "cpu", dtype: str = "float32") -> Ops:
    """Bind what would be chosen for a target."""
    cases = op_cases(
        config, target=target, dtype=dtype, kv_dtype=dtype, page_tokens=PAGE_TOKENS, formats=WeightFormats()
    )
    return bind(choose_all(cases))


class PagedDriver:
    """Several sequences over one decoder; every unwritten slot of the cache holds NaN."""

    def __init__(
        self,
        path: Path,
        *,
        seed: int,
        target: str = "cpu",
        device: str = "cpu",
        dtype: str = "float32",
        config: ModelConfig | None = None,
        wrap_ops: Callable[[Ops], Ops] = lambda ops: ops,
        engine: Artifact | None = None,
    ) -> None:
        """Take the checkpoint's weights as they are, or those of an engine that was built of it."""
        config = load_model_config(path) if config is None else config
        weights: Mapping[str, LinearWeight]
        if engine is None:
            weights, ops = load_twin_weights(path, config, dtype, device), chosen_ops(config, target, dtype)
        else:
            weights, ops = load_engine_weights(engine, device), bind(engine.manifest.ops)
        self.decoder = Decoder(config, weights, wrap_ops(ops), max_positions=config.context_tokens)
        shape = (config.n_layers, 2, N_BLOCKS, PAGE_TOKENS, config.n_kv_heads, config.head_dim)
        self._kv = KvCache.of(torch.full(shape, float("nan"), dtype=ARENA_DTYPES[dtype], device=device))
        self._device = device
        self._random = random.Random(seed)
        self._free = self._random.sample(range(N_BLOCKS), N_BLOCKS)
        self._blocks: dict[int, list[int]] = {}
        self._n_done: dict[int, int] = {}

    @torch.inference_mode()
    def step(self, runs: list[tuple[int, list[int]]]) -> list[Tensor]:
        """Run the next tokens of some sequences together; return logits_QV of each run."""
        query_start, kv_len, slots, positions = [0], [], [], []
        for sequence, tokens in runs:
            blocks = self._blocks.setdefault(sequence, [])
            start = self._n_done.get(sequence, 0)
            end = self._n_done[sequence] = start + len(tokens)
            while len(blocks) * PAGE_TOKENS < end:
                blocks.append(self._free.pop())
            positions += range(start, end)
            slots += [blocks[p // PAGE_TOKENS] * PAGE_TOKENS + p % PAGE_TOKENS for p in range(start, end)]
            query_start.append(query_start[-1] + len(tokens))
            kv_len.append(end)
        width = max(len(self._blocks[sequence]) for sequence, _ in runs)
        table = [self._blocks[s] + [0] * (width - len(self._blocks[s])) for s, _ in runs]
        inputs = StepInputs(
            token_T=torch.tensor([token for _, tokens in runs for token in tokens], device=self._device),
            position_T=torch.tensor(positions, device=self._device),
            slot_T=torch.tensor(slots, device=self._device),
            span=make_span(table, query_start, kv_len, self._device),
        )
        logits_TV = self.decoder.logits(self.decoder.forward(inputs, self._kv)).float()
        return [logits_TV[a:b] for a, b in zip(query_start, query_start[1:], strict=False)]

    def prefill(self, prompts: dict[int, list[int]], largest_chunk: int) -> dict[int, Tensor]:
        """Run prompts together in random chunks; return logits_QV of each whole prompt."""
        parts: dict[int, list[Tensor]] = {sequence: [] for sequence in prompts}
        left = dict(prompts)
        while left:
            runs = []
            for sequence in self._random.sample(sorted(left), self._random.randint(1, len(left))):
                n = self._random.randint(1, min(largest_chunk, len(left[sequence])))
                runs.append((sequence, left[sequence][:n]))
                left[sequence] = left[sequence][n:]
                if not left[sequence]:
                    del left[sequence]
            for (sequence, _), logits_QV in zip(runs, self.step(runs), strict=True):
                parts[sequence].append(logits_QV)
        return {sequence: torch.cat(logits) for sequence, logits in parts.items()}

    def greedy(self, next_token: dict[int, int], n: int) -> dict[int, list[int]]:
        """Decode n tokens of each sequence, all in one batch; the first ones are given."""
        tokens = {sequence: [token] for sequence, token in next_token.items()}
        for _ in range(n - 1):
            runs = [(sequence, generated[-1:]) for sequence, generated in tokens.items()]
            for (sequence, _), logits_QV in zip(runs, self.step(runs), strict=True):
                tokens[sequence].append(int(logits_QV[-1].argmax()))
        return tokens


def make_span(
    table: list[list[int]], query_start: list[int], kv_len: list[int], device: str = "cpu"
) -> AttentionSpan:
    """Make a span of host lists."""
    return AttentionSpan(
        block_table_RW=torch.tensor(table, dtype=torch.int32, device=device).reshape(len(kv_len), -1),
        row_B=torch.arange(len(kv_len), dtype=torch.int32, device=device),
        query_start=tuple(query_start),
        kv_len=tuple(kv_len),
        kv_len_B=torch.tensor(kv_len, dtype=torch.int32, device=device),
        query_start_B1=torch.tensor(query_start, dtype=torch.int32, device=device),
    )


def without_edge(config: ModelConfig, edge: str) -> ModelConfig:
    """Return the model as it would be if one of its particulars were ignored."""
    if edge == "window":
        return replace(config, layers=tuple(replace(layer, window_tokens=None) for layer in config.layers))
    if edge == "rope scaling":
        plain = [replace(layer.rope, scaling="none", attention_factor=1.0) for layer in config.layers]
        layers = zip(config.layers, plain, strict=True)
        return replace(config, layers=tuple(replace(layer, rope=rope) for layer, rope in layers))
    return replace(config, **{edge: None})
