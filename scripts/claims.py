"""What is claimed of ratios between rows: our formats against each other, and against plain PyTorch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sailfish.bench import peers
from sailfish.bench.budget import BATCHES
from sailfish.bench.results import Result

_BF16, _INT4 = "llama-3.1-8b bfloat16", "llama-3.1-8b int4"
_TPUT = "tput 512 x (512 in, 256 out)"
_SMALL_INT4 = f"{_INT4}, int4 head, int8 embedding"


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """A ratio of two rows, and what is wanted of it."""

    title: str
    of: str
    to: str
    least: float | None = None
    most: float | None = None

    def ratio(self, rows: Mapping[str, Result]) -> float | None:
        """Return the ratio, or None where a row was not measured; a peer's figure may be the second one."""
        known = peers.peer(self.to)
        best = None if known is None else known.best()
        to = rows[self.to].value if self.to in rows else None if best is None else best[1]
        return rows[self.of].value / to if self.of in rows and to else None

    @property
    def wanted(self) -> float | None:
        """Return the least or the most that the ratio may be."""
        return self.most if self.least is None else self.least

    @property
    def target(self) -> str:
        """Return what is wanted, in words."""
        sign = "at most" if self.least is None else "at least"
        return "" if self.wanted is None else f"{sign} {self.wanted:.3g}"

    def is_met_by(self, ratio: float) -> bool | None:
        """Say whether a ratio is what was wanted; None if nothing was."""
        if self.least is not None:
            return ratio >= self.least
        return None if self.most is None else ratio <= self.most


CLAIMS = (
    *(
        Claim(
            title=f"INT4 over BF16, decode B={b}",
            of=f"{_INT4}: decode B={b}",
            to=f"{_BF16}: decode B={b}",
            least=0.95,
        )
        for b in BATCHES
    ),
    Claim(title="INT4 over BF16, throughput", of=f"{_INT4}: {_TPUT}", to=f"{_BF16}: {_TPUT}", least=0.95),
    Claim(
        title="INT4 over 16-bit cuBLAS, decode B=1 (dequantising first would come on top: 40% less time)",
        of=f"{_INT4}: decode B=1",
        to=f"{_BF16}: decode B=1",
        least=1 / 0.6,
    ),
    Claim(
        title="INT4 weights, 8-bit head and embedding, over BF16, 7B",
        of="llama-2-7b int4, int8 head and embedding: resident weights",
        to="llama-2-7b bfloat16: resident weights",
        most=0.28,
    ),
    Claim(
        title="INT4 weights, INT4 head and 8-bit embedding, over BF16, 8B",
        of=f"{_SMALL_INT4}: resident weights",
        to=f"{_BF16}: resident weights",
        most=0.28,
    ),
    Claim(
        title="INT4 weights, 16-bit head and embedding, over BF16, 8B",
        of=f"{_INT4}: resident weights",
        to=f"{_BF16}: resident weights",
    ),
    *(
        Claim(
            title=f"BF16 over transformers generate, B={b}",
            of=f"{_BF16}: generate B={b} (128 in, 256 out)",
            to=f"transformers {_BF16}: generate B={b} (128 in, 256 out)",
            least=4.0,
        )
        for b in (16, 64, 256)
    ),
    *(
        Claim(
            title=f"BF16 over torch.compile, decode B={b}",
            of=f"{_BF16}: decode B={b}",
            to=f"torch.compile (default) {_BF16}: decode B={b}",
        )
        for b in BATCHES
    ),
)
