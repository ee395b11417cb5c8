"""GPTQ against its textbook, one column at a time in float64, and against brute force on tiny layers."""

from __future__ import annotations

import itertools
import lzma
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor

from sailfish.base.errors import BuildError, ConfigError
from sailfish.compress import gptq
from sailfish.compress.gptq import ActOrder, Hessian, quantise_gptq
from sailfish.compress.rtn import quantise_int4, restore_int4

SHARES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6)
ORDERS: tuple[ActOrder, ...] = ("none", "static groups")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def _inputs(n_tokens: int, n_in: int, *, spread: float = 1.0) -> Tensor:
    """Correlated inputs, float64: some of them, in no order, larger than others."""
    shared = torch.randn(n_tokens, n_in // 4 + 1, dtype=torch.float64)
    mixed = shared @ torch.randn(n_in // 4 + 1, n_in, dtype=torch.float64)
    x = mixed + torch.randn(n_tokens, n_in, dtype=torch.float64)
    return x * torch.exp(spread * torch.randn(n_in, dtype=torch.float64))


def _square(x: Tensor) -> Tensor:
    return x.T @ x / len(x)


def _error(restored: Tensor, w: Tensor, x: Tensor) -> Tensor:
    """Return the squared error of each row's outputs."""
    return (x @ (restored.double() - w.double()).T).square().sum(0)


def _restored(code: Tensor, scale: Tensor, zero: Tensor | None, group: int, bits: int = 4) -> Tensor:
    middle = torch.full_like(scale, 2 ** (bits - 1)) if zero is None else zero
    scale, middle = (x.double().repeat_interleave(group, 1)[:, : code.shape[1]] for x in (scale, middle))
    return (code.double() - middle) * scale


def _textbook_scale(
    w: Tensor, weigh: Tensor, symmetric: bool, bits: int, search: bool
) -> tuple[float, float]:
    """Return the (scale, zero) for the weights of one row in one group."""
    top, middle = 2**bits - 1, 2 ** (bits - 1)
    low, high = float(w.min()), float(w.max())
    found = []
    if symmetric:
        farthest = low if -low >= high else high
        candidates = [-farthest / middle * share for share in (middle / (middle - 1), *SHARES)]
    else:
        low, high = min(low, 0.0), max(high, 0.0)
        candidates = [(high - low) / top * share for share in SHARES]
    for i, candidate in enumerate(candidates[: None if search else 1]):
        scale = float(torch.tensor(candidate).bfloat16()) or 1.0
        zero = middle if symmetric else float((torch.tensor(-low * SHARES[i]).double() / scale).round())
        zero = min(max(zero, 0), top)
        code = ((w / scale).round() + zero).clamp(0, top)
        found.append((float(((code - zero) * scale - w).square() @ weigh), scale, zero))
    _, scale, zero = min(found, key=lambda one: one[0])
    return scale, zero


def _textbook(
    weight: Tensor, hessian: Tensor, group: int, *, symmetric: bool, order: ActOrder, bits: int, search: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return codes, scales and zeros: the inverse Hessian is updated after each column, without a factor."""
    (n_out, n_in), mean = weight.shape, hessian.diagonal().mean()
    damped = hessian.double().clone()
    damped.diagonal().add_((hessian.diagonal() == 0) * 0.01 * mean + 0.01 * mean)
    inverse, weigh, left = torch.linalg.inv(damped), damped.diagonal(), weight.double().clone()
    code = torch.zeros(n_out, n_in, dtype=torch.uint8)
    scale, zero = torch.zeros(2, n_out, -(-n_in // group), dtype=torch.float64)
    columns = list(range(n_in))
    if order == "static groups":
        columns.sort(key=lambda i: -float(hessian[i, i]))
    starts = range(0, n_in, group)
    for column in [*(starts if order == "static groups" else ()), *columns]:
        is_first = column % group == 0 and (order == "none" or not scale[:, column // group].any())
        if is_first:
            its = slice(column, column + group)
            for row in range(n_out):
                scale[row, column // group], zero[row, column // group] = _textbook_scale(
                    left[row, its], weigh[its], symmetric, bits, search
                )
            if order == "static groups":
                continue
        s, z = scale[:, column // group], zero[:, column // group]
        q = ((left[:, column] / s).round() + z).clamp(0, 2**bits - 1)
        code[:, column] = q.to(torch.uint8)
        wrong = (left[:, column] - (q - z) * s) / inverse[column, column]
        left -= wrong[:, None] * inverse[column]
        inverse -= torch.outer(inverse[:, column], inverse[column]) / inverse[column, column]
        inverse[column], inverse[:, column] = 0, 0  # exactly: this column is done
        inverse[column, column] = 1
        left[:, column] = 0
    return code, scale, zero


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("n_in", "group", "block"),
    [(64, 16, 32), (64, 16, 24), (70, 32, 8), (50, 50, 16), (40, 24, 7), (33, 8, 200)],
)
def test_codes_are_those_of_the_textbook(
    order: ActOrder, symmetric: bool, n_in: int, group: int, block: int
) -> None:
    w, x = torch.randn(9, n_in), _inputs(200, n_in)
    x[:, n_in // 3] = 0
    w[3, :group] = 0
    code, scale, zero, facts = quantise_gptq(
        w, _square(x), group, symmetric=symmetric, act_order=order, block=block, refit=False
    )
    its_code, its_scale, its_zero = _textbook(
        w, _square(x), group, symmetric=symmetric, order=order, bits=4, search=True
    )
    assert torch.equal(scale.double(), its_scale)
    assert torch.equal(code, its_code)
    assert (zero is None) == symmetric
    assert zero is None or torch.equal(zero.double(), its_zero)
    assert facts.damp == facts.asked_damp == 0.01 and facts.n_dead == 1


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 8])
def test_other_widths_have_codes_of_the_textbook_too(bits: int, symmetric: bool) -> None:
    w, x = torch.randn(6, 48), _inputs(150, 48)
    for order, search in itertools.product(ORDERS, (True, False)):
        code, scale, zero, _ = quantise_gptq(
            w,
            _square(x),
            16,
            symmetric=symmetric,
            act_order=order,
            search=search,
            refit=False,
            bits=bits,
        )
        its_code, its_scale, its_zero = _textbook(
            w, _square(x), 16, symmetric=symmetric, order=order, bits=bits, search=search
        )
        assert torch.equal(code, its_code) and torch.equal(scale.double(), its_scale)
        assert zero is None or torch.equal(zero.double(), its_zero)
        assert int(code.max()) < 2**bits


def test_a_float32_hessian_gives_nearly_the_codes_of_a_float64_one() -> None:
    w, x = torch.randn(64, 128), _inputs(600, 128)
    exact = quantise_gptq(w, _square(x), 32)
    working = quantise_gptq(w, _square(x).float(), 32)
    assert (exact[0] == working[0]).double().mean() > 0.98
    assert working[3].error == pytest.approx(exact[3].error, rel=0.01)


def test_the_error_told_is_that_of_the_outputs() -> None:
    w, x = torch.randn(16, 64), _inputs(300, 64)
    code, scale, zero, facts = quantise_gptq(w, _square(x), 32, symmetric=False)
    wrong = _error(_restored(code, scale, zero, 32), w, x).sum() / _error(torch.zeros(16, 64), w, x).sum()
    assert facts.error == pytest.approx(float(wrong) ** 0.5, rel=1e-9)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("order", ORDERS)
def test_outputs_are_nearer_than_those_of_weights_rounded_to_the_nearest(
    symmetric: bool, order: ActOrder
) -> None:
    w, x = torch.randn(64, 256), _inputs(1000, 256)
    rounded = restore_int4(*quantise_int4(w, 64, symmetric), 64)
    code, scale, zero, _ = quantise_gptq(w, _square(x).float(), 64, symmetric=symmetric, act_order=order)
    ours, theirs = _error(_restored(code, scale, zero, 64), w, x), _error(rounded, w, x)
    assert float(ours.sum()) < 0.5 * float(theirs.sum()) and bool((ours < theirs).all())


def test_a_real_layer_fed_with_real_text_keeps_its_outputs_better() -> None:
    """The first projections of a model of books: their inputs are known without running the model."""
    shared = Path(__file__).parents[2].parent / "shared"
    if not (shared / "models" / "books-4m").is_dir() or not (shared / "data").is_dir():
        pytest.skip("the models and texts in shared/ are not here")
    tensors = load_file(shared / "models" / "books-4m" / "model.safetensors")
    layer = "model.layers.0."
    w = torch.cat([tensors[f"{layer}self_attn.{name}_proj.weight"] for name in "qkv"])
    with lzma.open(shared / "data" / "books-calibration.txt.xz", "rt", encoding="utf-8") as stream:
        text = stream.read(60_000)
    tokenizer = Tokenizer.from_file(str(shared / "models" / "books-4m" / "tokenizer.json"))
    tokens = torch.tensor(tokenizer.encode(text).ids)
    x = F.rms_norm(tensors["model.embed_tokens.weight"][tokens].float(), (w.shape[1],), eps=1e-5)
    x = x * tensors[f"{layer}input_layernorm.weight"].float()
    n_seen = len(x) * 3 // 4
    hessian, held_out = Hessian(w.shape[1]), Hessian(w.shape[1])
    hessian.add(x[:n_seen])
    held_out.add(x[n_seen:])
    errors = []
    restored = [restore_int4(*quantise_int4(w, 128), 128)]
    for settings in ({"refit": False}, {}, {"sweeps": 3}):
        code, scale, zero, _ = quantise_gptq(w, hessian.mean_II, 128, **settings)
        restored.append(restore_int4(code, scale, zero, 128))
    for weight in restored:
        wrong = weight.double() - w.double()
        errors.append(float((wrong @ held_out.mean_II.double() * wrong).sum()))
    assert errors[1] < 0.7 * errors[0] and errors[3] < errors[2] < errors[1]


def test_weighty_inputs_first_lowers_the_error_where_inputs_differ() -> None:
    w, x = torch.randn(128, 256), _inputs(1000, 256, spread=1.5)
    errors = {
        order: quantise_gptq(w, _square(x).float(), 64, act_order=order, refit=False)[3].error
        for order in ORDERS
    }
    assert errors["static groups"] < 0.9 * errors["none"]


def test_no_choice_of_codes_is_better_than_one_that_sweeps_find_on_tiny_layers() -> None:
    """Brute force over all 4^5 codes of each row: sweeps never raise the error and mostly reach the least."""
    n_best = n_best_of_gptq = 0
    for _ in range(20):
        w, x = torch.randn(1, 5, dtype=torch.float64), _inputs(40, 5)
        hessian = _square(x)
        damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(5, dtype=torch.float64)
        first, scale, _, _ = quantise_gptq(w, hessian, None, refit=False, bits=2)
        swept, same, _, _ = quantise_gptq(w, hessian, None, refit=False, bits=2, sweeps=4)
        assert torch.equal(scale, same)
        every = torch.tensor(list(itertools.product(range(4), repeat=5)))
        wrong = _restored(every, scale.expand(len(every), 1), None, 5, bits=2) - w
        error = (wrong @ damped * wrong).sum(1)

        def its(code: Tensor, error: Tensor = error) -> float:
            return float(error[int((code.long() * 4 ** torch.arange(4, -1, -1)).sum())])

        least = float(error.min())
        assert least <= its(swept) * (1 + 1e-12) and its(swept) <= its(first) * (1 + 1e-12)
        for i, other in itertools.product(range(5), range(4)):  # no single code is better
            changed = swept.clone()
            changed[0, i] = other
            assert its(swept) <= its(changed) * (1 + 1e-12)
        n_best += its(swept) <= least * (1 + 1e-12)
        n_best_of_gptq += its(first) <= least * (1 + 1e-12)
    assert n_best >= n_best_of_gptq and n_best >= 8


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("n_in", "group"), [(64, 16), (56, 16), (48, None)])
def test_refitted_scales_are_those_of_least_squares_for_their_codes(
    symmetric: bool, n_in: int, group: int | None
) -> None:
    w, x = torch.randn(7, n_in, dtype=torch.float64), _inputs(300, n_in)
    damp = 1e-9
    code, scale, zero, _ = quantise_gptq(
        w, _square(x), group, symmetric=symmetric, damp=damp, dtype=torch.float64
    )
    group = group or n_in
    n_groups = -(-n_in // group)
    steps = _restored(code, torch.ones_like(scale), zero, group)
    for row in range(7):
        columns = torch.zeros(n_in, n_groups, dtype=torch.float64)
        for i in range(n_in):
            columns[i, i // group] = steps[row, i]
        expected = torch.linalg.lstsq(x @ columns, x @ w[row]).solution
        torch.testing.assert_close(scale[row], expected, rtol=1e-5, atol=1e-8)


def test_refitting_and_sweeping_lower_the_error_of_every_row() -> None:
    w, x = torch.randn(64, 128), _inputs(500, 128)
    damped = _square(x) + 0.01 * _square(x).diagonal().mean() * torch.eye(128, dtype=torch.float64)
    errors = []
    for refit, sweeps in ((False, 0), (True, 0), (True, 1), (True, 3)):
        code, scale, zero, _ = quantise_gptq(w, _square(x), 32, refit=refit, sweeps=sweeps, block=48)
        wrong = _restored(code, scale, zero, 32) - w
        errors.append((wrong @ damped * wrong).sum(1))
    for before, after in itertools.pairwise(errors):
        assert bool((after <= before * (1 + 1e-9)).all()) and after.sum() < before.sum()


def test_inputs_never_seen_are_rounded_to_the_nearest() -> None:
    w, x = torch.randn(24, 96), _inputs(300, 96)
    dead = torch.tensor([0, 5, 40, 95])
    x[:, dead] = 0
    for order in ORDERS:
        code, scale, _, facts = quantise_gptq(w, _square(x), 32, act_order=order, refit=False)
        steps = scale.float().repeat_interleave(32, 1)[:, dead]
        assert facts.n_dead == 4
        assert torch.equal(code[:, dead], ((w[:, dead] / steps).round() + 8).clamp(0, 15).to(torch.uint8))


def test_a_layer_that_saw_nothing_is_rounded_to_the_nearest() -> None:
    w = torch.randn(24, 96)
    for symmetric in (True, False):
        code, scale, zero, facts = quantise_gptq(
            w, Hessian(96).mean_II, 32, symmetric=symmetric, search=False, refit=False
        )
        assert facts.n_dead == 96 and facts.error == 0
        expected = quantise_int4(w, 32, symmetric, search=False)
        assert torch.equal(code, expected[0]) and torch.equal(scale, expected[1])
        assert (zero is None) == (expected[2] is None) == symmetric
        assert zero is None or expected[2] is None or torch.equal(zero, expected[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_singular_hessian_is_damped_more_and_says_so(dtype: torch.dtype) -> None:
    w, x = torch.randn(16, 64), _inputs(10, 64)  # fewer inputs than weights, and two of them alike
    x[:, 1] = x[:, 0]
    code, scale, zero, facts = quantise_gptq(w, _square(x).to(dtype), 32, damp=0.0)
    assert facts.asked_damp == 0 < facts.damp <= 0.01
    assert _error(_restored(code, scale, zero, 32), w, x).sum() < (
        _error(restore_int4(*quantise_int4(w, 32), 32), w, x).sum()
    )
    assert quantise_gptq(w, _square(x).to(dtype), 32)[3].damp == 0.01


def test_a_hessian_is_the_mean_over_all_that_was_added() -> None:
    x = _inputs(90, 20)
    for dtype, within in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        hessian = Hessian(20, dtype=dtype)
        for part in (x[:1], x[1:41].view(4, 10, 20), x[41:41], x[41:].to(dtype)):
            hessian.add(part)
        assert hessian.n_tokens == 90 and hessian.mean_II.dtype == dtype
        torch.testing.assert_close(hessian.mean_II.double(), _square(x), rtol=within, atol=within)


@pytest.mark.parametrize("chunk", [1, 1000])
def test_results_do_not_depend_on_how_many_rows_are_worked_on_at_once(
    chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    w, x = torch.randn(30, 64), _inputs(300, 64)
    whole = quantise_gptq(w, _square(x), 16, symmetric=False, sweeps=1)
    monkeypatch.setitem(gptq._CHUNK_ELEMENTS, "cpu", chunk)
    parts = quantise_gptq(w, _square(x), 16, symmetric=False, sweeps=1)
    for one, other in zip(whole[:3], parts[:3], strict=True):
        assert one is not None and other is not None and torch.equal(one, other)
    assert parts[3].error == pytest.approx(whole[3].error, rel=1e-9)


def test_weights_in_bfloat16_have_the_codes_of_the_same_numbers_in_float32() -> None:
    w, x = torch.randn(30, 64).bfloat16(), _inputs(300, 64)
    one, other = (quantise_gptq(weight, _square(x).float(), 32) for weight in (w, w.float()))
    assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_refused(bad: float) -> None:
    w, hessian = torch.randn(8, 32), torch.eye(32)
    for tensor, what in ((w, "weights"), (hessian, "inputs' squares")):
        kept = tensor[3, 3].clone()
        tensor[3, 3] = bad
        with pytest.raises(BuildError, match=f"{what} are not finite"):
            quantise_gptq(w, hessian, 32)
        tensor[3, 3] = kept


def test_what_does_not_fit_is_refused_in_words() -> None:
    w = torch.randn(8, 32)
    with pytest.raises(BuildError, match=r"\(16, 16\) is not that of 32 inputs"):
        quantise_gptq(w, torch.eye(16), 32)
    with pytest.raises(BuildError, match="float32 or float64, not torch.bfloat16"):
        quantise_gptq(w, torch.eye(32).bfloat16(), 32)
    with pytest.raises(BuildError, match="no damping"):
        quantise_gptq(w, torch.eye(32) - 1e4 * (torch.ones(32, 32) - torch.eye(32)), 32)
    with pytest.raises(BuildError, match="too large"):
        quantise_gptq(w * 1e30, torch.eye(32), 32, dtype=torch.float16)
    for settings in ({"bits": 1}, {"bits": 9}, {"block": 0}, {"damp": -0.1}):
        with pytest.raises(ConfigError, match="not supported"):
            quantise_gptq(w, torch.eye(32), 32, **settings)
