"""What the table says of the attention kernels is what their skins say, without loading torch."""

from __future__ import annotations

from itertools import product

from sailfish.kernels.contract import Case, StepBounds
from sailfish.kernels.cuda import decode_attention, prefill_attention
from sailfish.kernels.cuda.attention_limits import paged_bytes, rejects_paged


def test_the_table_declines_exactly_what_either_kernel_declines() -> None:
    heads = ((1, 1), (8, 8), (32, 8), (16, 1), (17, 1), (32, 1), (33, 1), (71, 1))
    for head_dim, page, dtype, kv_dtype, (n_heads, n_kv) in product(
        (16, 64, 72, 80, 96, 128, 192, 256),
        (8, 16, 32, 64, 128),
        ("bfloat16", "float32"),
        ("", "int8"),
        heads,
    ):
        case = Case(
            op="attention",
            target="sm_90",
            dtype=dtype,
            kv_dtype=kv_dtype,
            head_dim=head_dim,
            page_tokens=page,
            n_heads=n_heads,
            n_kv_heads=n_kv,
        )
        bits = 8 if kv_dtype else 16
        declined = decode_attention.rejects(head_dim, page, dtype, n_heads // n_kv, bits)
        declined = declined or prefill_attention.rejects(head_dim, page, dtype)
        assert (rejects_paged(case) is None) == (declined is None), case


def test_what_blocks_of_a_decode_exchange_is_planned_for_few_and_for_many_sequences() -> None:
    bounds = StepBounds(step_tokens=2048, max_sequences=256, context_tokens=4096)
    formats = (("bfloat16", 0), ("int8", 1))
    for head_dim, (kv_dtype, kv), group in product(decode_attention.HEAD_DIMS, formats, (1, 4, 8, 16)):
        if kv and head_dim % 32:
            continue
        case = Case(
            op="attention",
            target="sm_90",
            dtype="bfloat16",
            kv_dtype=kv_dtype,
            head_dim=head_dim,
            n_heads=8 * group,
            n_kv_heads=8,
        )
        for is_hopper, n_processors in ((True, 132), (False, 188)):
            shapes = {
                decode_attention._shape(head_dim, kv, -(-group // 8), is_hopper, is_many)
                for is_many in (False, True)
            }
            words = sum(n_processors * shape.blocks * shape.slot_words for shape in shapes)
            assert 4 * words <= paged_bytes(case, bounds), (head_dim, kv_dtype, group, is_hopper)
