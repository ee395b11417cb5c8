"""Bits given under a budget beside an exhaustive search; sensitivities beside models rounded by hand."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from twins import VOCAB_SIZE, load_truth, make_twin

from sailfish.base.errors import ConfigError
from sailfish.checkpoint.formats.codec import quantised_modules
from sailfish.checkpoint.safetensors_reader import Checkpoint
from sailfish.compress import recipe as recipes
from sailfish.compress.block import Device
from sailfish.compress.gptq import Hessian, quantise_gptq
from sailfish.compress.make import Request, make, within
from sailfish.compress.recipe import Bound, Calibration, Round
from sailfish.compress.rtn import restore_int
from sailfish.compress.sensitivity import FORMATS, N_WINDOWS, Cost, choose, measure, mixed
from sailfish.quality.windows import Window

ON = Device(target="cpu", dtype="float32")


def cost(matrix: str, number: int, kl: float, n_weights: int = 64) -> Cost:
    rounding = Round(to=FORMATS[number][0], group=FORMATS[number][1])
    return Cost(matrix=matrix, modules=(matrix,), n_weights=n_weights, n_in=4096, rounding=rounding, kl=kl)


@st.composite
def tables(draw: st.DrawFn) -> list[Cost]:
    """Return the costs of up to four matrices, each less with more bits, with falling returns."""
    found = []
    for matrix in range(draw(st.integers(1, 4))):
        n_weights = 64 * draw(st.integers(1, 4))
        kl = draw(st.floats(0.1, 1.0))
        for number in range(len(FORMATS)):
            found.append(cost(f"m{matrix}", number, kl, n_weights))
            kl *= draw(st.floats(0.05, 0.6))
    return found


@settings(max_examples=60, deadline=None)
@given(costs=tables(), budget=st.floats(3.2, 8.2))
def test_a_choice_keeps_its_budget_and_is_near_the_best_there_is(costs: list[Cost], budget: float) -> None:
    chosen = choose(costs, budget_bits=budget)
    n_weights = sum(one.n_weights for one in chosen)
    assert sum(one.bits for one in chosen) <= budget * n_weights
    by_matrix = [[one for one in costs if one.matrix == own.matrix] for own in chosen]
    best = min(
        sum(one.kl for one in choice)
        for choice in itertools.product(*by_matrix)
        if sum(one.bits for one in choice) <= budget * n_weights
    )
    largest_step = max(one.kl for one in costs)
    assert best - 1e-12 <= sum(one.kl for one in chosen) <= best + largest_step


@settings(max_examples=60, deadline=None)
@given(costs=tables(), max_kl=st.floats(0.01, 2.0))
def test_a_bound_on_the_divergence_is_kept_or_refused(costs: list[Cost], max_kl: float) -> None:
    least = sum(min(one.kl for one in costs if one.matrix == name) for name in {o.matrix for o in costs})
    if least > max_kl:
        with pytest.raises(ConfigError, match="is out of reach"):
            choose(costs, max_kl=max_kl)
    else:
        assert sum(one.kl for one in choose(costs, max_kl=max_kl)) <= max_kl + 1e-9


def test_a_budget_below_the_smallest_format_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"3 bits a weight are less than the smallest format's 3\.125"):
        choose([cost("m", 0, 1.0), cost("m", 1, 0.5)], budget_bits=3)


def test_a_format_that_costs_more_bits_and_more_divergence_is_never_chosen() -> None:
    costs = [cost("m", 0, 0.1), cost("m", 1, 0.5), cost("m", 5, 0.05)]
    assert choose(costs, budget_bits=5) == costs[:1]


def test_a_sensitivity_is_the_divergence_of_a_model_with_one_matrix_rounded_by_the_recipes_method(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    source = make_twin("llama", tmp_path_factory.getbasetemp())
    ids = np.random.default_rng(3).integers(0, VOCAB_SIZE, (2 + N_WINDOWS, 40))
    windows = [Window(tokens=row.tolist()) for row in ids]
    recipe = recipes.load("w4a16-gptq")
    found = measure(source, recipe, windows, ON, lambda *_: None, formats=[("int4", 32)])
    assert len(found) == 12
    truth = load_truth(source)
    mlp, hessian = truth.model.layers[1].mlp, Hessian(truth.config.hidden_size)
    learned, measured = torch.tensor(ids).split([2, N_WINDOWS])
    with torch.no_grad():
        parent = truth(measured).logits[:, :-1].double().log_softmax(-1)
        hook = mlp.gate_proj.register_forward_pre_hook(lambda _, x: hessian.add(x[0]))
        truth(learned)
        hook.remove()
        for part in (mlp.gate_proj, mlp.up_proj):
            codes = quantise_gptq(part.weight.detach(), hessian.mean_II, 32, search=False, refit=False)[:3]
            part.weight.copy_(restore_int(*codes, 32))
        ours = truth(measured).logits[:, :-1].double().log_softmax(-1)
    kl = float((parent.exp() * (parent - ours)).sum(-1).mean())
    its = next(one for one in found if one.matrix == "layers.1.gate_up.weight")
    assert its.kl == pytest.approx(kl, rel=1e-3)
    assert its.modules == ("model.layers.1.mlp.gate_proj", "model.layers.1.mlp.up_proj")


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_mixed_checkpoint_keeps_its_budget_and_beats_one_format(
    symmetric: bool, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    source = make_twin("llama", tmp_path_factory.getbasetemp())
    text = tmp_path / "ids.json"
    text.write_text(json.dumps(np.random.default_rng(5).integers(0, VOCAB_SIZE, 512).tolist()))
    recipe = msgspec.structs.replace(
        recipes.load("w4a16-rtn"), calibration=Calibration(samples=6, tokens=48), bound=Bound()
    )
    assert recipe.round is not None
    rounding = msgspec.structs.replace(recipe.round, symmetric=symmetric)
    recipe = msgspec.structs.replace(recipe, round=rounding)
    request = Request(
        source=source,
        recipe=recipe,
        calibration=text,
        evaluation=None,
        n_evaluation=3,
        on=ON,
        device_name="cpu",
        free_bytes=1 << 40,
    )
    uniform = make(request, tmp_path / "uniform", lambda *_: None)
    asked = within(request, 5.5, None, lambda *_: None)
    report = make(asked, tmp_path / "mixed", lambda *_: None)
    # Besides, the shape of each linear is stored, and zero points fill whole words.
    more = sum(8 * (16 + 4 * facts.n_in // 32) for facts in report.linears)
    assert report.linear_bits <= 5.5 + more / sum(facts.n_out * facts.n_in for facts in report.linears)
    with pytest.raises(ConfigError, match="says itself how some linears are rounded"):
        within(asked, 5.5, None, lambda *_: None)
    assert report.quality.kl.value < uniform.quality.kl.value
    assert sum(one.is_chosen for one in report.sensitivity) == 12
    assert len(quantised_modules(Checkpoint.open(tmp_path / "mixed").tensors)) == 21
    with pytest.raises(ConfigError, match="has one format for all weights"):
        within(replace(request, recipe=recipes.load("fp8")), 4.25, None, lambda *_: None)
    assert mixed(recipe, []).overrides == []
