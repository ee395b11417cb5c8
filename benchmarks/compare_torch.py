"""Measures the Llama-3.1-8B shape in plain PyTorch: transformers' generate, and a compiled, captured decode.

    python benchmarks/compare_torch.py [--out FILE] [--only eager|compiled] [--mode MODE]

Rows go beside those of `sailfish bench engine`, which measures the hand-made path on the same shape.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sailfish.bench.calibrate import calibrate
from sailfish.bench.results import Recorder, Result, command, store
from sailfish.bench.shapes import SHAPES
from sailfish.hardware.replay import replayed_us

SHAPE = "llama-3.1-8b"
OUT = Path(__file__).parent / "results" / "compare.jsonl"
BATCHES = (1, 16, 64, 256)
GENERATED = (16, 64, 256)
N_IN, N_OUT = 128, 256
SEEN, CONTEXT = 256, 512


def eager(recorder: Recorder, repeats: int) -> Iterator[Result]:
    """Yield the throughput of transformers' generate, greedy, with its default cache: over whole calls."""
    import transformers

    config = transformers.LlamaConfig(**{k: v for k, v in SHAPES[SHAPE].items() if k != "torch_dtype"})
    with torch.device("cuda"):
        torch.set_default_dtype(torch.bfloat16)
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
        torch.set_default_dtype(torch.float32)
    for batch in GENERATED:

        def seconds(batch: int = batch) -> float:
            prompt = torch.randint(8, config.vocab_size, (batch, N_IN), device="cuda")
            torch.cuda.synchronize()
            start_s = time.perf_counter()
            with torch.inference_mode():
                answer = model.generate(
                    prompt,
                    attention_mask=torch.ones_like(prompt),
                    max_new_tokens=N_OUT,
                    min_new_tokens=N_OUT,
                    do_sample=False,
                    pad_token_id=0,
                )
            torch.cuda.synchronize()
            assert answer.shape == (batch, N_IN + N_OUT)
            return time.perf_counter() - start_s

        seconds()  # cuDNN plans attention anew for each length, the first time
        rates = [batch * N_OUT / seconds() for _ in range(repeats)]
        row = f"transformers {SHAPE} bfloat16: generate B={batch} ({N_IN} in, {N_OUT} out)"
        yield recorder.result(row, rates, "tokens/s")


class Layer(nn.Module):
    """One decoder layer over a cache of fixed size, for `torch.compile`."""

    def __init__(self, batch: int) -> None:
        super().__init__()
        shape = SHAPES[SHAPE]
        self.d, self.m = shape["hidden_size"], shape["intermediate_size"]
        self.h, self.k = shape["num_attention_heads"], shape["num_key_value_heads"]
        self.e = self.d // self.h
        self.qkv = nn.Linear(self.d, (self.h + 2 * self.k) * self.e, bias=False)
        self.o = nn.Linear(self.d, self.d, bias=False)
        self.gate_up = nn.Linear(self.d, 2 * self.m, bias=False)
        self.down = nn.Linear(self.m, self.d, bias=False)
        self.norms = nn.Parameter(torch.ones(2, self.d))
        self.register_buffer("cache", torch.randn(2, batch, self.k, CONTEXT, self.e))

    def forward(self, x_BD: Tensor, cos_E: Tensor, sin_E: Tensor, at_1: Tensor, mask: Tensor) -> Tensor:
        """Return the layer's output for one token of each sequence."""
        n = len(x_BD)
        y = F.rms_norm(x_BD, (self.d,), self.norms[0], 1e-5)
        q, k, v = self.qkv(y).split((self.h * self.e, self.k * self.e, self.k * self.e), -1)
        q, k = (_rotated(part.view(n, -1, self.e), cos_E, sin_E) for part in (q, k))
        self.cache[0].index_copy_(2, at_1, k.unsqueeze(2))
        self.cache[1].index_copy_(2, at_1, v.view(n, self.k, 1, self.e))
        attended = F.scaled_dot_product_attention(
            q.unsqueeze(2), self.cache[0], self.cache[1], attn_mask=mask, enable_gqa=True
        )
        x_BD = x_BD + self.o(attended.reshape(n, -1))
        gate, up = self.gate_up(F.rms_norm(x_BD, (self.d,), self.norms[1], 1e-5)).chunk(2, -1)
        return x_BD + self.down(F.silu(gate) * up)


def _rotated(x: Tensor, cos_E: Tensor, sin_E: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return x * cos_E + torch.cat((-b, a), -1) * sin_E


class Step:
    """A decode step of the whole model, its layers compiled once."""

    def __init__(self, batch: int, mode: str) -> None:
        n_layers, vocabulary = SHAPES[SHAPE]["num_hidden_layers"], SHAPES[SHAPE]["vocab_size"]
        torch.set_default_dtype(torch.bfloat16)
        self.layers = [Layer(batch) for _ in range(n_layers)]
        self.d, e = self.layers[0].d, self.layers[0].e
        self.table, self.head = torch.randn(vocabulary, self.d), torch.randn(vocabulary, self.d)
        self.cos_E, self.sin_E = torch.rand(e), torch.rand(e)
        torch.set_default_dtype(torch.float32)
        self.token_B = torch.randint(0, vocabulary, (batch,))
        self.at_1 = torch.tensor([SEEN - 1])
        self.mask = (torch.arange(CONTEXT) < SEEN).expand(batch, 1, 1, CONTEXT)
        self.run_layer = torch.compile(Layer.forward, fullgraph=True, mode=mode)

    def __call__(self) -> None:
        """Draw the next token of each sequence."""
        x_BD = F.embedding(self.token_B, self.table)
        for layer in self.layers:
            x_BD = self.run_layer(layer, x_BD, self.cos_E, self.sin_E, self.at_1, self.mask)
        logits = F.linear(F.rms_norm(x_BD, (self.d,)), self.head)
        self.token_B.copy_(logits.argmax(-1))


def compiled(recorder: Recorder, mode: str, repeats: int) -> Iterator[Result]:
    """Yield decode rates of a step whose layers are compiled, and captured as one CUDA graph."""
    for batch in BATCHES:
        torch.compiler.reset()
        with torch.device("cuda"), torch.inference_mode():
            step = Step(batch, mode)
            start_s = time.perf_counter()
            step()
            torch.cuda.synchronize()
            compile_s = time.perf_counter() - start_s
            us = replayed_us([step], runs=repeats)
        rates = [batch * 1e6 / each for each in us]
        name = f"torch.compile ({mode}) {SHAPE} bfloat16"
        yield recorder.result(f"{name}: decode B={batch}", rates, "tokens/s")
        yield recorder.result(f"{name}: compilation B={batch}", [compile_s], "s")
        del step
        torch.cuda.empty_cache()


def main() -> None:
    """Measure what was not skipped and append the rows, each as it comes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--only", choices=("eager", "compiled"))
    parser.add_argument("--mode", default="default", help="mode of torch.compile")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    recorder = Recorder(
        suite="compare",
        device=torch.cuda.get_device_name(),
        command=command(["python", "benchmarks/compare_torch.py", *sys.argv[1:]]),
        calibration=calibrate("cuda"),
    )
    rows: list[Iterator[Result]] = []
    if args.only != "eager":
        rows.append(compiled(recorder, args.mode, args.repeats))
    if args.only != "compiled":
        rows.append(eager(recorder, args.repeats))
    for row in chain(*rows):
        store([row], args.out)
        sys.stdout.write(f"{row.row:70} {row.value:10.5g} {row.unit} ±{row.spread:.2g}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
