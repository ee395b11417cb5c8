"""Random quantised layers, schemes and configs for the tests of foreign formats."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from sailfish.checkpoint.formats.linear import QuantisedLinear
from sailfish.checkpoint.formats.scheme import ActivationScheme, LinearScheme

ACTIVATIONS = [
    ActivationScheme(kind=kind, dynamic=dynamic, strategy=strategy)
    for kind in ("int", "float")
    for dynamic, strategy in ((True, "token"), (True, "tensor"), (False, "tensor"))
]


@st.composite
def schemes(draw: st.DrawFn, layouts: tuple[str, ...]) -> LinearScheme:
    layout = draw(st.sampled_from(layouts))
    is_gptq = layout.startswith("gptq")
    widths = {"gptq": [2, 3, 4, 8], "gptq_v2": [2, 3, 4, 8], "awq": [4], "pack-quantized": list(range(1, 9))}
    kinds = ["channel", "group"] if is_gptq or layout == "awq" else ["channel", "group", "tensor"]
    kind = draw(st.sampled_from(kinds))
    zero_points = layout != "float-quantized" and kind != "tensor" and draw(st.booleans())
    has_activations = layout in ("pack-quantized", "int-quantized", "float-quantized")
    return LinearScheme(
        layout=layout,
        bits=draw(st.sampled_from(widths.get(layout, [8]))),
        strategy=kind,
        group=draw(st.sampled_from([32, 64])) if kind == "group" else None,
        symmetric=not zero_points,
        act_order=kind == "group" and layout != "awq" and draw(st.booleans()),
        activations=draw(st.sampled_from([None, *ACTIVATIONS])) if has_activations else None,
    )


def random_linear(scheme: LinearScheme, n_out: int, n_in: int, seed: int) -> QuantisedLinear:
    """Return a layer that the scheme can hold; some zero points are 0, scales may be negative."""
    random = np.random.default_rng(seed)
    group = scheme.group or n_in
    shape_OG = (n_out, -(-n_in // group))
    scale_OG = random.normal(size=shape_OG).astype(np.float16).astype(np.float32)
    if scheme.strategy == "tensor":
        scale_OG[:] = scale_OG[0, 0]
    code_OI = random.integers(0, 1 << scheme.bits, (n_out, n_in), np.uint8)
    if scheme.is_float:
        code_OI[(code_OI & 0x7F) == 0x7F] = 0
    zero_OG = None
    if not scheme.symmetric:
        zero_OG = random.integers(0, 1 << scheme.bits, shape_OG, np.uint8)
        zero_OG[0, 0] = 0  # never the middle everywhere
    g_idx = None
    if scheme.act_order:
        g_idx = random.permutation(np.arange(n_in, dtype=np.int32) // group)
        g_idx = None if np.array_equal(g_idx, np.sort(g_idx)) else g_idx
    is_static = scheme.activations is not None and not scheme.activations.dynamic
    return QuantisedLinear(
        code_OI=code_OI,
        scale_OG=scale_OG,
        zero_OG=zero_OG,
        g_idx=g_idx,
        group=group,
        bits=scheme.bits,
        scale_dtype="F16",
        is_float=scheme.is_float,
        input_scale=np.array([0.25], np.float32) if is_static else None,
    )


def is_same(one: QuantisedLinear, other: QuantisedLinear) -> bool:
    """Say whether two layers are equal in every bit."""
    for name in ("code_OI", "scale_OG", "zero_OG", "g_idx", "input_scale"):
        ours, theirs = getattr(one, name), getattr(other, name)
        if (ours is None) is not (theirs is None):
            return False
        if ours is not None and (ours.dtype != theirs.dtype or not np.array_equal(ours, theirs)):
            return False
    facts = ("group", "bits", "scale_dtype", "is_float")
    return all(getattr(one, name) == getattr(other, name) for name in facts)
