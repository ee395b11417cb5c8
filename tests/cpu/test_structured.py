"""Structured pruning beside transformers and brute force: what is left is the model that was measured."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
import transformers
from huggingface_hub.errors import StrictDataclassClassValidationError
from safetensors.torch import load_file, save_file
from test_compress import LENGTH, N_SAMPLES, asked, perplexity, restored, silent, small, tokens
from torch import Tensor
from twins import TWINS, VOCAB_SIZE, load_truth, make_twin
from typer.testing import CliRunner

from sailfish.base.errors import BuildError, ConfigError
from sailfish.checkpoint.files import read_json
from sailfish.checkpoint.hf_config import load_model_config
from sailfish.checkpoint.safetensors_reader import Checkpoint
from sailfish.cli.main import application
from sailfish.compress.cut import config_values, n_layers_left, narrowed
from sailfish.compress.make import Costly, make
from sailfish.compress.recipe import Bound, Calibration, Cut, Override, Recipe
from sailfish.compress.report import PAGE_FILE
from sailfish.compress.sensitivity import mixed
from sailfish.compress.structured import group_energy, leave
from sailfish.quality.model import WindowModel

SHAPES = (
    "llama_tied",
    "mistral",
    "qwen2",
    "qwen3",
    "glm4",
    "gemma2",
    "gemma3_text",
    "qwen3_moe",
    "mixtral",
)
"""A twin of each family, and one with every bias."""


def cutting(cut: Cut, **changes: Any) -> Recipe:
    return msgspec.structs.replace(small("prune-width"), cut=cut, **changes)


def sparse_twin(source: Path, path: Path) -> Path:
    """Write a twin of which a layer, a kv head of each other layer and 32 channels weigh nothing."""
    random = torch.Generator().manual_seed(3)
    path.mkdir()
    for file in source.iterdir():
        if file.suffix != ".safetensors":
            (path / file.name).write_bytes(file.read_bytes())
            continue
        tensors = load_file(file)
        for name, tensor in tensors.items():
            found = re.match(r"model\.layers\.(\d)\.(self_attn\.o_proj|mlp\.down_proj|.*experts.*)\.", name)
            if found and found[1] == "1":
                tensor.zero_()
            elif found and found[2] == "self_attn.o_proj" and tensor.ndim == 2:
                tensor.view(len(tensor), 2, -1)[:, int(found[1]) // 2] = 0
            elif found and found[2] == "mlp.down_proj" and tensor.ndim == 2:
                tensor[:, torch.randperm(112, generator=random)[:32]] = 0
        save_file(tensors, path / file.name, metadata={"format": "pt"})
    return path


def logits(directory: Path, ids: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = load_truth(directory)(ids[None]).logits[0]
    return found


@pytest.mark.parametrize("family", SHAPES)
def test_parts_that_weigh_nothing_go_and_the_logits_stay(
    family: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    twin, text = make_twin(family, tmp_path_factory.getbasetemp()), tokens(tmp_path)
    source = sparse_twin(twin, tmp_path / "sparse")
    has_experts = "moe" in family or family == "mixtral"
    cut = Cut(layers=0.3, heads=0.5, width=0.0 if has_experts else 0.25)
    report = make(asked(source, cutting(cut), text), tmp_path / "out", silent)
    parent, config = load_model_config(source), load_model_config(tmp_path / "out")
    assert (config.n_layers, config.n_heads, config.n_kv_heads, config.head_dim) == (2, 3, 1, 16)
    assert config.d_mlp == (112 if has_experts else 80)
    assert config.layers == (parent.layers[0], parent.layers[2])
    gone = {removed.where: removed for removed in report.removed}
    assert gone["model.layers.1"].influence == pytest.approx(0.0, abs=1e-6)
    assert len(gone) == (3 if has_experts else 5)
    parts = [removed for removed in gone.values() if removed.what != "layer"]
    assert all(removed.influence == removed.repaired == 0 for removed in parts)
    ids = torch.randint(VOCAB_SIZE, (LENGTH,), generator=torch.Generator().manual_seed(1))
    theirs, truth = logits(tmp_path / "out", ids), logits(source, ids)
    torch.testing.assert_close(theirs, truth, rtol=1e-4, atol=1e-4)
    model = WindowModel.of_checkpoint(tmp_path / "out", window_tokens=LENGTH)
    ours = model.logits(model.hidden(ids.tolist()))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert report.quality.kl.value < 1e-6
    assert report.bytes_after < report.bytes_before


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_the_influence_of_blocks_is_that_of_their_states_in_transformers(
    family: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    source, text = make_twin(family, tmp_path_factory.getbasetemp()), tokens(tmp_path)
    report = make(asked(source, cutting(Cut(layers=0.4)), text), tmp_path / "out", silent)
    model, influence = load_truth(source), []

    def measure(_: object, before: tuple[Tensor], after: Tensor) -> None:
        x, y = before[0].double(), after.double()
        influence.append(1 - float(((x * y).sum(-1) / x.norm(dim=-1) / y.norm(dim=-1)).mean()))

    for layer in model.model.layers:
        layer.register_forward_hook(measure)
    with torch.no_grad():
        model(torch.tensor(json.loads(text.read_text(encoding="utf-8"))).view(-1, LENGTH)[:N_SAMPLES])
    assert report.block_influence == pytest.approx(influence, rel=1e-4)
    assert [removed.where for removed in report.removed] == ["model.layers.0", "model.layers.1"]
    truth = perplexity(load_truth(tmp_path / "out"), text)
    assert report.quality.perplexity.value == pytest.approx(truth, rel=2e-4)


def _inputs(n_in: int) -> Tensor:
    random = torch.Generator().manual_seed(0)
    mix = torch.randn(n_in, n_in, generator=random, dtype=torch.float64)
    return torch.randn(256, n_in, generator=random, dtype=torch.float64) @ mix


@pytest.mark.parametrize("n_groups", [24, 4])
def test_the_groups_that_stay_are_those_whose_outputs_are_largest(n_groups: int) -> None:
    x_TI = _inputs(24)
    weight_OI = torch.randn(7, 24, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    parts = x_TI.view(256, n_groups, -1).transpose(0, 1) @ weight_OI.view(7, n_groups, -1).permute(1, 2, 0)
    energy_G = parts.square().sum(-1).mean(-1)
    hessian_II = x_TI.T @ x_TI / len(x_TI)
    torch.testing.assert_close(group_energy(weight_OI, hessian_II, n_groups), energy_G)
    left = leave(weight_OI, hessian_II, n_groups, 2, damp_frac=None)
    assert sorted(energy_G.topk(2).indices.tolist()) == left.group_U.tolist()
    assert torch.equal(left.weight_OJ, weight_OI[:, left.index_J])
    lost = (x_TI @ weight_OI.T - x_TI[:, left.index_J] @ left.weight_OJ.T).norm() / (
        x_TI @ weight_OI.T
    ).norm()
    assert left.lost == pytest.approx(float(lost), rel=1e-5)


def test_the_repair_is_the_damped_least_squares_fit() -> None:
    """Against least squares over the tokens themselves, the damping as rows of its own."""
    x_TI, damp_frac = _inputs(24), 0.05
    weight_OI = torch.randn(7, 24, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    hessian_II = x_TI.T @ x_TI / len(x_TI)
    left = leave(weight_OI, hessian_II, 24, 18, damp_frac=damp_frac)
    kept_TJ, plain_OJ = x_TI[:, left.index_J], weight_OI[:, left.index_J]
    damp = damp_frac * float(kept_TJ.square().mean())
    rows = torch.cat([kept_TJ, (damp * len(x_TI)) ** 0.5 * torch.eye(18, dtype=torch.float64)])
    aims = torch.cat([x_TI @ weight_OI.T, (damp * len(x_TI)) ** 0.5 * plain_OJ.T])
    torch.testing.assert_close(left.weight_OJ, torch.linalg.lstsq(rows, aims).solution.T)
    wrong = x_TI @ weight_OI.T - kept_TJ @ left.weight_OJ.T
    assert left.repaired == pytest.approx(float(wrong.norm() / (x_TI @ weight_OI.T).norm()), rel=1e-5)
    assert left.repaired is not None and left.repaired < 0.7 * left.lost
    hessian_II[0, 0] = float("nan")
    with pytest.raises(BuildError, match="not finite"):
        leave(weight_OI, hessian_II, 24, 18, damp_frac=damp_frac)


def test_the_repair_brings_the_model_nearer_to_its_parent(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    source, n_samples = make_twin("llama", tmp_path_factory.getbasetemp()), 30
    text = tokens(tmp_path, (n_samples + 3) * LENGTH)
    kl = {}
    for repair in (True, False):
        recipe = cutting(
            Cut(heads=0.5, repair=repair), calibration=Calibration(samples=n_samples, tokens=LENGTH)
        )
        report = make(asked(source, recipe, text), None, silent)
        kl[repair] = report.quality.kl.value
        assert all((removed.repaired is not None) is repair for removed in report.removed)
    assert kl[True] < kl[False]


def test_what_a_cut_leaves_has_the_dtype_of_the_parent(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    base = tmp_path_factory.getbasetemp()
    source, text = make_twin("glm4", base, dtype=torch.bfloat16), tokens(tmp_path)
    report = make(asked(source, cutting(Cut(heads=0.5, width=0.25)), text), tmp_path / "out", silent)
    assert {tensor.dtype for tensor in Checkpoint.open(tmp_path / "out").tensors.values()} == {"BF16"}
    assert report.linear_bits == 16
    assert all(facts.n_bytes == facts.dense_bytes for facts in report.linears)
    assert report.bytes_after < 0.8 * report.bytes_before
    truth = perplexity(load_truth(tmp_path / "out"), text)
    assert report.quality.perplexity.value == pytest.approx(truth, rel=2e-4)


def test_what_a_cut_leaves_is_rounded_in_the_same_pass(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    source, text = make_twin("llama", tmp_path_factory.getbasetemp()), tokens(tmp_path)
    recipe = small(
        "w4a16-gptq",
        cut=Cut(layers=0.3, heads=0.5, width=0.25),
        overrides=[Override(match="model.layers.2.mlp.down_proj", round=None)],
    )
    with pytest.raises(ConfigError, match="cuts parts of the model, and a budget is one of the whole"):
        mixed(msgspec.structs.replace(recipe, overrides=[]), [])
    report = make(asked(source, recipe, text), tmp_path / "out", silent)
    layers = {removed.where for removed in report.removed if removed.what == "layer"}
    assert layers <= {"model.layers.0", "model.layers.1"} and len(layers) == 1
    values = read_json(tmp_path / "out" / "config.json")
    assert "model.layers.1.mlp.down_proj" in values["quantization_config"]["ignore"]
    how = {facts.module: facts.how for facts in report.linears}
    assert how["model.layers.2.mlp.down_proj"] == "cut"
    assert how["model.layers.2.mlp.up_proj"] == "cut, int4 GPTQ"
    truth = perplexity(load_truth(restored(tmp_path / "out", tmp_path / "dense")), text)
    assert report.quality.perplexity.value == pytest.approx(truth, rel=2e-4)


def test_a_cut_beyond_the_bound_is_refused_beside_the_other_cuts(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    source, text = make_twin("llama", tmp_path_factory.getbasetemp()), tokens(tmp_path)
    recipe = msgspec.structs.replace(small("prune-heads"), bound=Bound(max_kl=1e-3))
    with pytest.raises(Costly, match=r"prune-heads costs too much") as caught:
        make(asked(source, recipe, text), tmp_path / "out", silent)
    assert caught.value.hint == "raise the bound in a recipe of your own"
    assert not (tmp_path / "out").exists()


def test_recipes_that_were_done_stay_where_a_later_one_is_refused(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    source, text = make_twin("llama", tmp_path_factory.getbasetemp()), tokens(tmp_path)
    words = ["compress", str(source), "--calibration", str(text), "--must-pay", "--device", "cpu"]
    words += ["--length", "48", "--samples", "6", "--eval-windows", "3", "-o", str(tmp_path / "out")]
    for names, left in (
        (["w8a16", "prune-width"], []),
        (["prune-width", "w8a16"], [PAGE_FILE, "prune-width"]),
    ):
        asks = [*words, *(word for name in names for word in ("-r", name))]
        refused = CliRunner().invoke(application(asks), asks).exception
        assert isinstance(refused, BuildError) and "w8a16 does not pay: no kernel here" in str(refused)
        assert sorted(path.name for path in tmp_path.glob("out/*")) == left
        assert (f"{tmp_path / 'out' / 'prune-width'} stays" in str(refused)) is bool(left)
        assert (tmp_path / "out").exists() is bool(left)
    assert "32 of 112 channels" in (tmp_path / "out" / PAGE_FILE).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("family", "cut", "said"),
    [
        ("mixtral", Cut(width=0.25), "the width of experts is not cut"),
        ("llama", Cut(heads=0.9), "a share of 0.9 leaves none of 2 key/value heads"),
        ("llama", Cut(layers=0.7), "a share of 0.7 leaves none of 3 layers"),
        ("llama", Cut(width=0.9), "a share of 0.9 leaves none of 112 MLP channels"),
    ],
)
def test_a_cut_that_leaves_no_model_is_refused_in_words(
    family: str, cut: Cut, said: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    config = load_model_config(make_twin(family, tmp_path_factory.getbasetemp()))
    with pytest.raises(ConfigError, match=said):
        n_layers_left(narrowed(config, cut), cut)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3_text", "mistral", "qwen2", "qwen3", "glm4"])
def test_heads_are_refused_where_transformers_would_not_load_them(
    family: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """5 of 6 heads do not divide a width of 96."""
    config = load_model_config(make_twin(family, tmp_path_factory.getbasetemp()))
    config = replace(config, n_kv_heads=6)
    kind, settings = TWINS[family]
    shape = {"hidden_size": 96, "num_attention_heads": 5, "head_dim": 16, "num_hidden_layers": 3}
    try:
        getattr(transformers, kind)(**{**settings, **shape})
    except StrictDataclassClassValidationError:
        with pytest.raises(ConfigError, match="5 of 6 heads would stay, which do not divide the width of 96"):
            narrowed(config, Cut(heads=0.1))
    else:
        assert narrowed(config, Cut(heads=0.1)).n_heads == 5


@pytest.mark.parametrize(
    "values",
    [
        {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 64, "max_window_layers": 2},
        {"model_type": "gemma2", "sliding_window": 64},
        {"model_type": "gemma3_text", "sliding_window": 64, "sliding_window_pattern": 3},
        {"model_type": "mistral", "sliding_window": 64},
        {
            "model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8,
            "decoder_sparse_step": 2, "mlp_only_layers": [3],
        },
    ],
)  # fmt: skip
def test_layers_keep_their_kind_whatever_the_config_says_it_by(
    values: dict[str, Any], tmp_path: Path
) -> None:
    shape = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 6, "num_attention_heads": 4}
    values = {**shape, **values, "vocab_size": 16, "max_position_embeddings": 128, "dtype": "float32"}
    (tmp_path / "config.json").write_text(json.dumps(values), encoding="utf-8")
    parent, kept = load_model_config(tmp_path), (0, 2, 3, 5)
    child = replace(parent, layers=tuple(parent.layers[layer] for layer in kept))
    (tmp_path / "config.json").write_text(json.dumps(config_values(values, child)), encoding="utf-8")
    assert load_model_config(tmp_path) == child
