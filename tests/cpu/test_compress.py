"""The compressor beside transformers: what is written is what was measured, in every family."""

from __future__ import annotations

import copy
import functools
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from stored_twins import stored_linears
from transformers import AutoModelForCausalLM
from twins import TWINS, VOCAB_SIZE, load_truth, make_twin
from typer.testing import CliRunner

from sailfish.base.errors import BuildError, CheckpointError, ConfigError
from sailfish.checkpoint.files import read_json
from sailfish.checkpoint.formats.linear import QuantisedLinear
from sailfish.checkpoint.hf_config import load_model_config
from sailfish.checkpoint.safetensors_reader import Checkpoint
from sailfish.cli.main import application
from sailfish.compress import recipe as recipes
from sailfish.compress import speed
from sailfish.compress.block import Device, read_tensor
from sailfish.compress.gptq import Hessian, quantise_gptq
from sailfish.compress.make import Costly, Request, make
from sailfish.compress.page import side_by_side
from sailfish.compress.recipe import Bound, Calibration, Recipe, Static
from sailfish.compress.report import PAGE_FILE, REPORT_FILE, from_json
from sailfish.compress.speed import RESTORED, speeds
from sailfish.compress.texts import read_texts
from sailfish.data import demo_model

LENGTH = 48
N_SAMPLES, N_EVALUATION = 6, 3


def silent(what: str, done: int, total: int) -> None:
    """Take progress and say nothing."""


def tokens(directory: Path, n: int = (N_SAMPLES + N_EVALUATION) * LENGTH) -> Path:
    """Write a file of random token ids, and return it."""
    ids = np.random.default_rng(5).integers(0, VOCAB_SIZE, n)
    (directory / "ids.json").write_text(json.dumps(ids.tolist()), encoding="utf-8")
    return directory / "ids.json"


def small(name: str, **changes: Any) -> Recipe:
    """Return a packaged recipe in groups of 32, without bounds, with short windows."""
    recipe = recipes.load(name)
    rounding = recipe.round
    if rounding is not None and rounding.group is not None:
        rounding = msgspec.structs.replace(rounding, group=32)
    fold = recipe.fold
    if fold is not None:
        fold = msgspec.structs.replace(fold, grid=4)
    return msgspec.structs.replace(
        recipe,
        round=rounding,
        fold=fold,
        calibration=Calibration(samples=N_SAMPLES, tokens=LENGTH),
        bound=Bound(),
        **changes,
    )


def asked(source: Path, recipe: Recipe, text: Path) -> Request:
    return Request(
        source=source,
        recipe=recipe,
        calibration=text,
        evaluation=None,
        n_evaluation=N_EVALUATION,
        on=Device(target="cpu", dtype="float32"),
        device_name="cpu",
        free_bytes=1 << 40,
    )


def linears(directory: Path) -> dict[str, QuantisedLinear]:
    """Return the rounded linears of a checkpoint by module."""
    return {module: linear for module, (_, linear) in stored_linears(directory).items()}


def restored(directory: Path, to: Path) -> Path:
    """Write a compressed checkpoint as a dense one, by our reader of its format, for transformers."""
    checkpoint = Checkpoint.open(directory)
    values = read_json(directory / "config.json")
    rounded = linears(directory) if "quantization_config" in values else {}
    tensors = {f"{m}.weight": torch.from_numpy(linear.dequantise()) for m, linear in rounded.items()}
    for name in checkpoint.tensors:
        if name.rpartition(".")[0] not in rounded or name.endswith(".bias"):
            tensors[name] = read_tensor(checkpoint, name).clone()
    values.pop("quantization_config", None)
    to.mkdir()
    save_file(tensors, to / "model.safetensors", metadata={"format": "pt"})
    (to / "config.json").write_text(json.dumps(values), encoding="utf-8")
    return to


def perplexity(model: Any, text: Path) -> float:
    """Return a transformers model's perplexity over the windows at the end of the text."""
    ids = torch.tensor(json.loads(text.read_text(encoding="utf-8")))
    windows = ids[-N_EVALUATION * LENGTH :].view(N_EVALUATION, LENGTH)
    with torch.no_grad():
        logits = model(windows).logits[:, :-1].double()
    nll = torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
    return math.exp(float(nll))


@pytest.mark.parametrize("family", TWINS)
def test_what_is_written_of_any_family_is_what_was_measured(
    family: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    source, text = make_twin(family, tmp_path_factory.getbasetemp()), tokens(tmp_path)
    report = make(asked(source, small("w4a16-awq"), text), tmp_path / "out", silent)
    quality = report.quality
    assert quality.parent_perplexity.value == pytest.approx(perplexity(load_truth(source), text), rel=2e-4)
    truth = perplexity(load_truth(restored(tmp_path / "out", tmp_path / "dense")), text)
    assert quality.perplexity.value == pytest.approx(truth, rel=2e-4)
    assert quality.n_tokens == N_EVALUATION * (LENGTH - 1)
    assert from_json((tmp_path / "out" / REPORT_FILE).read_bytes()) == report
    names = {facts.module for facts in report.linears}
    assert names == set(linears(tmp_path / "out"))
    assert any(facts.alpha is not None for facts in report.linears)


@pytest.mark.parametrize("name", recipes.names())
def test_every_packaged_recipe_writes_what_it_measured(
    name: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    source, text = make_twin("llama", tmp_path_factory.getbasetemp()), tokens(tmp_path)
    recipe = small(name)
    report = make(asked(source, recipe, text), tmp_path / "out", silent)
    if recipe.activations == "none":
        truth = perplexity(load_truth(restored(tmp_path / "out", tmp_path / "dense")), text)
        assert report.quality.perplexity.value == pytest.approx(truth, rel=2e-4)
    weights = [f for f in (tmp_path / "out").iterdir() if f.suffix == ".safetensors"]
    assert report.bytes_after <= sum(f.stat().st_size for f in weights) <= report.bytes_after + (1 << 16)
    assert {"config.json", "tokenizer.json", REPORT_FILE, PAGE_FILE} <= {
        f.name for f in (tmp_path / "out").iterdir()
    }
    if recipe.prune is not None:
        dense = Checkpoint.open(tmp_path / "dense")
        for facts in report.linears:
            is_zero_OI = read_tensor(dense, f"{facts.module}.weight") == 0
            assert facts.zeros_frac == pytest.approx(float(is_zero_OI.float().mean()))
            if recipe.prune.keep is not None and recipe.prune.of is not None:
                n_zeros = is_zero_OI.view(-1, recipe.prune.of).sum(1)
                assert int(n_zeros.min()) >= recipe.prune.of - recipe.prune.keep
            else:
                assert recipe.prune.zeros is not None and facts.zeros_frac >= recipe.prune.zeros


@pytest.mark.filterwarnings("ignore")  # of transformers and compressed-tensors
@pytest.mark.parametrize("name", ["fp8", "fp8-static", "w8a8-static"])
def test_transformers_with_compressed_tensors_measures_the_same(
    name: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    source, text = make_twin("llama", tmp_path_factory.getbasetemp()), tokens(tmp_path)
    report = make(asked(source, small(name), text), tmp_path / "out", silent)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert report.quality.perplexity.value == pytest.approx(perplexity(theirs, text), rel=1e-5)
    assert abs(report.quality.increase.value) > 1e-3, "rounding shows"


@pytest.mark.parametrize("method", ["min-max", "percentile", "entropy"])
def test_a_static_scale_is_what_its_method_finds_in_what_linears_read(
    method: Any, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    source, text = make_twin("llama", tmp_path_factory.getbasetemp()), tokens(tmp_path)
    recipe = msgspec.structs.replace(small("w8a8-static"), fold=None, static=Static(method=method, kept=0.9))
    make(asked(source, recipe, text), tmp_path / "out", silent)
    ids = torch.tensor(json.loads(text.read_text(encoding="utf-8"))).view(-1, LENGTH)[:N_SAMPLES]
    truth = load_truth(source).model
    with torch.no_grad():
        values = truth.layers[0].input_layernorm(truth.embed_tokens(ids)).abs().flatten().sort().values
    scale = linears(tmp_path / "out")["model.layers.0.self_attn.q_proj"].input_scale
    assert scale is not None
    limit = float(scale[0]) * 127
    if method == "min-max":
        assert limit == pytest.approx(float(values[-1]), rel=2**-8)
    elif method == "percentile":
        assert limit == pytest.approx(float(values[int(0.9 * len(values))]), rel=0.01)
    else:
        assert float(values[len(values) // 2]) < limit <= float(values[-1]) * 1.01


def test_experts_that_round_their_inputs_are_measured_so(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    source, text = make_twin("mixtral", tmp_path_factory.getbasetemp()), tokens(tmp_path)
    report = make(asked(source, small("fp8"), text), tmp_path / "out", silent)
    model = load_truth(restored(tmp_path / "out", tmp_path / "dense"))

    def in_8_bits(x: torch.Tensor) -> torch.Tensor:
        scale = x.abs().amax(-1, keepdim=True) / 448
        return (x / scale).to(torch.float8_e4m3fn).float() * scale

    def forward(experts: Any, x: torch.Tensor, expert: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        out = torch.zeros_like(x)
        for number, (gate_up, down) in enumerate(zip(experts.gate_up_proj, experts.down_proj, strict=True)):
            token, place = torch.where(expert == number)
            gate, up = (in_8_bits(x[token]) @ gate_up.T).chunk(2, -1)
            y = in_8_bits(torch.nn.functional.silu(gate) * up) @ down.T
            out.index_add_(0, token, y * weight[token, place, None])
        return out

    for layer in model.model.layers:
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            layer.self_attn.get_submodule(name).register_forward_pre_hook(lambda _, x: in_8_bits(x[0]))
        layer.mlp.experts.forward = functools.partial(forward, layer.mlp.experts)
    assert report.quality.perplexity.value == pytest.approx(perplexity(model, text), rel=2e-5)


def test_later_blocks_are_rounded_to_the_inputs_that_rounded_blocks_make(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    source, text = make_twin("llama", tmp_path_factory.getbasetemp()), tokens(tmp_path)
    make(asked(source, small("w4a16-gptq"), text), tmp_path / "out", silent)
    found = linears(tmp_path / "out")
    model = load_truth(source)
    ids = torch.tensor(json.loads(text.read_text(encoding="utf-8"))).view(-1, LENGTH)[:N_SAMPLES]
    for number, layer in enumerate(model.model.layers):
        hessians = {
            part: Hessian(layer.get_submodule(part).in_features)
            for part in ("self_attn.k_proj", "mlp.down_proj")
        }
        hooks = [
            layer.get_submodule(part).register_forward_pre_hook(lambda _, x, h=hessian: h.add(x[0]))
            for part, hessian in hessians.items()
        ]
        with torch.no_grad():
            model(ids)
        for hook in hooks:
            hook.remove()
        for part, hessian in hessians.items():
            linear = found[f"model.layers.{number}.{part}"]
            code, scale, *_ = quantise_gptq(
                layer.get_submodule(part).weight.detach(), hessian.mean_II, 32, search=False, refit=False
            )
            assert np.array_equal(linear.scale_OG, scale.float().numpy())
            assert float((torch.from_numpy(linear.code_OI) != code).float().mean()) < 0.01
        with torch.no_grad():
            for module, linear in found.items():
                if module.startswith(f"model.layers.{number}."):
                    model.get_submodule(module).weight.copy_(torch.from_numpy(linear.dequantise()))


def test_a_result_beyond_the_bound_is_not_written_and_the_nearest_recipe_that_keeps_it_is_named(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    source, text = make_twin("llama", tmp_path_factory.getbasetemp()), tokens(tmp_path)
    recipe = msgspec.structs.replace(recipes.load("w4a16-2of4"), calibration=small("fp8").calibration)
    bound = Bound(max_kl=0.02)
    with pytest.raises(
        Costly, match=r"w4a16-2of4 costs too much: the divergence .*, more than 0\.02"
    ) as caught:
        make(asked(source, msgspec.structs.replace(recipe, bound=bound), text), tmp_path / "out", silent)
    assert " keeps it: perplexity " in str(caught.value.hint)
    assert [path.name for path in tmp_path.iterdir()] == ["ids.json"]


def test_a_singular_hessian_is_listed_and_refused_where_strict(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    source, text = make_twin("llama", tmp_path_factory.getbasetemp()), tokens(tmp_path)
    recipe = small("w4a16-gptq")
    assert recipe.round is not None
    recipe = msgspec.structs.replace(
        recipe,
        round=msgspec.structs.replace(recipe.round, damp=0.0),
        calibration=Calibration(samples=1, tokens=LENGTH),
    )
    request = asked(source, recipe, text)
    report = make(request, tmp_path / "loose", silent)
    assert {fallback.what for fallback in report.fallbacks} == {"damping"}
    with pytest.raises(BuildError, match="the Hessian was singular"):
        make(replace(request, strict=True), tmp_path / "strict", silent)
    assert not (tmp_path / "strict").exists()


def test_a_format_that_no_kernel_here_reads_does_not_pay(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    source, text = make_twin("llama", tmp_path_factory.getbasetemp()), tokens(tmp_path)
    request = replace(asked(source, small("w4a16-rtn"), text), must_pay=True)
    with pytest.raises(BuildError, match="does not pay: no kernel here reads its weights"):
        make(request, tmp_path / "out", silent)
    dense = replace(request, recipe=small("wanda-2of4"))
    with pytest.raises(BuildError, match="dense weights take what the parent's do"):
        make(dense, tmp_path / "out", silent)
    report = make(replace(request, free_bytes=0), tmp_path / "out", silent)
    assert all(speed.packed_us is None for speed in report.speeds)


def test_speeds_are_of_what_the_engine_multiplies(tmp_path_factory: pytest.TempPathFactory) -> None:
    config = load_model_config(make_twin("llama", tmp_path_factory.getbasetemp()))
    on = Device(target="sm_90", dtype="bfloat16")
    on_cpu = Device(target="cpu", dtype="float32")
    assert {speed.implementation for speed in speeds(config, small("w8a16"), on_cpu)} == {RESTORED}
    assert not speeds(config, small("wanda-2of4"), on_cpu)
    mixed = small(
        "w4a16-rtn",
        overrides=[
            recipes.Override(match="re:.*q_proj", round=recipes.Round(to="int8", group=None)),
            recipes.Override(match="re:.*down_proj", round=None),
            recipes.Override(match="re:.*o_proj", round=recipes.Round(to="int3", group=64)),
        ],
    )
    d, width = config.d_model, config.n_heads * config.head_dim
    rows = {(s.n_out, s.n_in): s for s in speeds(config, mixed, on_cpu)}
    assert (d, config.d_mlp) not in rows  # it stays dense
    assert rows[width + 2 * config.n_kv_heads * config.head_dim, d].implementation == RESTORED
    assert rows[2 * config.d_mlp, d].implementation != RESTORED != rows[d, width].implementation
    weight = torch.randn(256, 128)
    packing = speed._Packing("int4", 128, True)
    packed, _ = speed._packed(weight, packing, weight)
    again = copy.deepcopy(packed)
    assert torch.equal(again.packed, packed.packed) and again.packed.data_ptr() != packed.packed.data_ptr()
    assert speed._case(packing, on, 256, 4096, 1).group == 128


def test_linears_named_in_overrides_are_rounded_otherwise(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    source, text = make_twin("llama", tmp_path_factory.getbasetemp()), tokens(tmp_path)
    recipe = small(
        "w4a16-rtn",
        overrides=[
            recipes.Override(match="re:.*down_proj", round=recipes.Round(to="int8", group=None)),
            recipes.Override(match="model.layers.1.self_attn.q_proj", round=None),
            recipes.Override(match="model.layers.99.mlp.up_proj", round=None),
        ],
    )
    report = make(asked(source, recipe, text), tmp_path / "out", silent)
    found = linears(tmp_path / "out")
    assert {linear.bits for module, linear in found.items() if "down_proj" in module} == {8}
    assert {linear.bits for module, linear in found.items() if "down_proj" not in module} == {4}
    assert "model.layers.1.self_attn.q_proj" not in found
    assert "overrides that name no linear: model.layers.99.mlp.up_proj" in report.warnings
    truth = perplexity(load_truth(restored(tmp_path / "out", tmp_path / "dense")), text)
    assert report.quality.perplexity.value == pytest.approx(truth, rel=2e-4)


def test_what_cannot_be_compressed_is_refused_in_words(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    source, text = make_twin("llama", tmp_path_factory.getbasetemp()), tokens(tmp_path)
    make(asked(source, small("fp8"), text), tmp_path / "out", silent)
    with pytest.raises(CheckpointError, match="is quantised already"):
        make(asked(tmp_path / "out", small("fp8"), text), tmp_path / "again", silent)
    with pytest.raises(ConfigError, match="exists already"):
        make(asked(source, small("fp8"), text), tmp_path / "out", silent)
    short = tokens(tmp_path, n=LENGTH)
    with pytest.raises(ConfigError, match="are not enough"):
        make(asked(source, small("fp8"), short), tmp_path / "short", silent)


@pytest.mark.parametrize("layout", ["gptq", "gptq_v2", "awq"])
def test_the_layouts_of_other_tools_hold_what_was_measured(
    layout: Any, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    source, text = make_twin("llama", tmp_path_factory.getbasetemp()), tokens(tmp_path)
    recipe = small("w4a16-awq", layout=layout)
    if recipe.round is not None and layout == "awq":  # its groups have to be whole
        recipe = msgspec.structs.replace(recipe, round=msgspec.structs.replace(recipe.round, group=None))
    report = make(asked(source, recipe, text), tmp_path / "out", silent)
    values = read_json(tmp_path / "out" / "config.json")["quantization_config"]
    assert values["quant_method"] == layout.removesuffix("_v2")
    assert {linear.scale_dtype for linear in linears(tmp_path / "out").values()} == {"F16"}
    truth = perplexity(load_truth(restored(tmp_path / "out", tmp_path / "dense")), text)
    assert report.quality.perplexity.value == pytest.approx(truth, rel=2e-4)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["w4a16-best", "w3a16-best", "w8a16", "w8a8-smooth", "fp8", "w4a16-2of4"])
def test_transformers_runs_what_we_compress(
    name: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    source, text = make_twin("llama", tmp_path_factory.getbasetemp(), dtype=torch.bfloat16), tokens(tmp_path)
    recipe = small(name)
    if recipe.round is not None and recipe.round.group is not None:
        rounding = msgspec.structs.replace(recipe.round, group=None)  # its groups have to be whole
        recipe = msgspec.structs.replace(recipe, round=rounding)
    report = make(asked(source, recipe, text), tmp_path / "out", silent)
    # int8 and fp8 activations are rounded there as here, in float32.
    model = load_truth(tmp_path / "out")
    assert report.quality.perplexity.value == pytest.approx(perplexity(model, text), rel=2e-3)
    if recipe.prune is not None:
        for facts in report.linears:  # unpacked there by now: zeros are exact, two of every four
            weight_OI = model.get_submodule(facts.module).weight
            assert int((weight_OI.view(-1, 4) == 0).sum(1).min()) >= 2


def test_the_command_compresses_by_several_recipes_and_shows_them_side_by_side(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    source, text = make_twin("llama", tmp_path_factory.getbasetemp()), tokens(tmp_path, n=1600)
    (tmp_path / "mine.yaml").write_text(recipes.text(small("w4a16-gptq")).replace("w4a16-gptq", "mine"))
    mine, out = str(tmp_path / "mine.yaml"), tmp_path / "out"
    words = ["compress", str(source), "-r", mine, "-r", "w8a16", "-o", str(out), "--calibration", str(text)]
    words += ["--length", "48", "--samples", "6", "--eval-windows", "3", "--device", "cpu"]
    found = CliRunner().invoke(application(words), words, catch_exceptions=False)
    assert found.exit_code == 0
    for said in ("parent", "mine", "w8a16", "no kernel here", "wrote "):
        assert said in found.output
    assert sorted(path.name for path in out.iterdir()) == [PAGE_FILE, "mine", "w8a16"]
    reports = [from_json((out / name / REPORT_FILE).read_bytes()) for name in ("mine", "w8a16")]
    assert reports[0].calibration_windows == 6
    on_page = (out / PAGE_FILE).read_text(encoding="utf-8")
    for row in side_by_side(reports)[1]:
        assert all(cell in found.output and f">{cell}<" in on_page for cell in row[:-1])
    (tmp_path / "other.yaml").write_text(
        (tmp_path / "mine.yaml").read_text().replace("name: mine", "name: other").replace(": 48", ": 24")
    )
    unlike = ["compress", str(source), "-r", mine, "-r", str(tmp_path / "other.yaml"), "--device", "cpu"]
    refused = CliRunner().invoke(application(unlike), unlike).exception
    assert isinstance(refused, ConfigError) and "windows of different lengths" in str(refused)
    again = CliRunner().invoke(application(words), words)
    assert isinstance(again.exception, ConfigError)
    budget = [*words[:2], "--budget", "many", "-r", mine, "-o", str(tmp_path / "none")]
    refused = CliRunner().invoke(application(budget), budget).exception
    assert isinstance(refused, ConfigError) and "a budget of 'many' is none" in str(refused)


def test_experts_that_no_token_reached_are_said_to_be_rounded_as_they_were(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    source, text = make_twin("mixtral", tmp_path_factory.getbasetemp()), tokens(tmp_path)
    recipe = small("w4a16-gptq")
    recipe = msgspec.structs.replace(recipe, calibration=Calibration(samples=1, tokens=3))
    report = make(asked(source, recipe, text), tmp_path / "out", silent)
    how = {(facts.output_error is None, facts.how) for facts in report.linears}
    assert how == {(True, "int4 RTN"), (False, "int4 GPTQ")}
    assert {fallback.what for fallback in report.fallbacks} >= {"calibration"}
    static = msgspec.structs.replace(small("fp8-static"), calibration=recipe.calibration)
    report = make(asked(source, static, text), tmp_path / "static", silent)
    whys = {fallback.where: fallback.why for fallback in report.fallbacks}
    assert 0 < len(whys) < len(report.linears)
    assert all("the static scale of its inputs is 1" in why for why in whys.values())


def test_the_packaged_text_is_enough_for_the_packaged_recipes() -> None:
    texts = read_texts(
        demo_model(),
        None,
        None,
        Calibration(samples=32, tokens=256),
        16,
        vocab_size=8192,
        context_tokens=2048,
    )
    assert (len(texts.calibration), len(texts.evaluation)) == (32, 16)
    ends = {tuple(window.tokens) for window in texts.evaluation}
    assert not ends & {tuple(window.tokens) for window in texts.calibration}
    assert ["calibrated with the packaged text" in warning for warning in texts.warnings] == [True]
    longer = read_texts(
        demo_model(),
        None,
        None,
        Calibration(samples=128, tokens=4096),
        2,
        vocab_size=8192,
        context_tokens=2048,
    )
    assert len(longer.calibration[0].tokens) == 2048
    assert any("of the 128 calibration windows" in warning for warning in longer.warnings)
