"""What `inspect` says of each quantised linear, and of what another reader could take wrongly."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from formats_fixtures import random_linear
from test_formats_convert import INTERCHANGE, UP, small

from sailfish.checkpoint.formats.codec import write_linear
from sailfish.checkpoint.formats.config_writer import write_quant_config
from sailfish.checkpoint.formats.explain import LinearFacts, explain_linears, format_warnings
from sailfish.checkpoint.formats.linear import QuantisedLinear
from sailfish.checkpoint.formats.scheme import LinearScheme, QuantConfig, Rule
from sailfish.checkpoint.formats.writer import CheckpointWriter
from sailfish.checkpoint.hf_config import load_model_config
from sailfish.checkpoint.model_config import StoredWeights
from sailfish.checkpoint.safetensors_reader import Checkpoint
from sailfish.cli.main import main

G32 = LinearScheme(layout="pack-quantized", bits=4, strategy="group", group=32)
GPTQ = replace(G32, layout="gptq")
STORED = StoredWeights(
    format="int4", group=32, zero_points=False, ordered=(), static=(), others=(), words="", restored=None
)


def one(
    directory: Path,
    scheme: LinearScheme,
    *,
    said: LinearScheme | None = None,
    change: Callable[[QuantisedLinear], QuantisedLinear] = lambda linear: linear,
    **keys: Any,
) -> Path:
    """Write a folder of one linear stored by a scheme; its config may say another."""
    method = "gptq" if scheme.layout.startswith("gptq") else "compressed-tensors"
    rule = Rule(targets=("Linear",), scheme=said or scheme)
    config = write_quant_config(QuantConfig(method=method, rules=(rule,), ignore=("lm_head",)))
    with CheckpointWriter(directory) as writer:
        linear = change(random_linear(scheme, 32, 64, 3))
        for part, tensor in write_linear(linear, scheme, UP).items():
            writer.add(f"{UP}.{part}", tensor)
        writer.finish({"config.json": json.dumps({"quantization_config": config | keys}).encode()})
    return directory


def facts(directory: Path) -> LinearFacts:
    [found] = explain_linears(Checkpoint.open(directory))
    return found


def test_a_linear_is_explained_by_its_parts(tmp_path: Path) -> None:
    found = facts(small(tmp_path / "source"))
    assert (found.name, found.layout, found.shape) == (UP, "pack-quantized", (32, 64))
    assert found.words == "4 bits in groups of 32" and found.kept and not found.warnings
    assert dict(found.tensors) == {
        "weight_packed": "I32 [32, 8]",
        "weight_scale": "F16 [32, 2]",
        "weight_shape": "I64 [2]",
    }
    assert found.n_bytes == 32 * 8 * 4 + 32 * 2 * 2 + 16
    assert found.bits == pytest.approx(8 * found.n_bytes / (32 * 64))


@pytest.mark.parametrize(
    ("scheme", "keys", "says"),
    [
        (replace(GPTQ, act_order=True), {"desc_act": False}, "in act-order, which the config does not say"),
        (replace(GPTQ, symmetric=False), {"sym": True}, "has zero points, though the config says symmetric"),
        (
            replace(GPTQ, layout="gptq_v2"),
            {"checkpoint_format": "gptq"},
            "stored as in gptq_v2, though the config says gptq",
        ),
        (GPTQ, {"desc_act": True}, "act-order is set, but its inputs are in order"),
    ],
)
def test_a_config_that_says_otherwise_is_told(
    scheme: LinearScheme, keys: dict[str, Any], says: str, tmp_path: Path
) -> None:
    assert says in "; ".join(facts(one(tmp_path / "x", scheme, **keys)).warnings)
    assert not facts(one(tmp_path / "sound", scheme)).warnings


def test_scales_of_nothing_and_codes_at_their_ends_are_told(tmp_path: Path) -> None:
    def without_scale(linear: QuantisedLinear) -> QuantisedLinear:
        scale_OG = linear.scale_OG.copy()
        scale_OG[3, 1] = 0
        return replace(linear, scale_OG=scale_OG)

    def cut(linear: QuantisedLinear) -> QuantisedLinear:
        code_OI = linear.code_OI.copy()
        code_OI[:, ::3] = 15
        return replace(linear, code_OI=code_OI)

    assert facts(one(tmp_path / "zero", G32, change=without_scale)).warnings == (
        "1 scales are 0: their weights are all 0",
    )
    assert (
        "of its codes are at an end of their range"
        in facts(one(tmp_path / "cut", G32, change=cut)).warnings[0]
    )


def test_what_the_config_alone_shows_is_told(tmp_path: Path) -> None:
    restored = replace(STORED, restored="no kernel reads inputs in act-order")
    found = "; ".join(format_warnings(Checkpoint.open(one(tmp_path / "gptq", GPTQ)), restored))
    for words in ("stored less one (gptq)", "restores some weights", "scales are float16"):
        assert words in found
    cache = {"kv_cache_scheme": {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False}}
    found = "; ".join(format_warnings(Checkpoint.open(one(tmp_path / "kv", G32, **cache)), STORED))
    assert "8-bit KV cache are not used" in found


def inspected(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str
) -> tuple[str, str]:
    monkeypatch.setattr(sys, "argv", ["sailfish", "inspect", *words])
    with pytest.raises(SystemExit) as caught:
        main()
    assert not caught.value.code
    said = capsys.readouterr()
    return said.out, said.err


@pytest.mark.parametrize(
    ("folder", "stored", "kept"),
    [
        (
            "ct-w4a16-awq-asym",
            "compressed-tensors, 4 bits in groups of 128, asymmetric",
            "int4, groups of 128",
        ),
        ("ct-w8a8-smoothquant", "8 bits by channel, dynamic int8 activations", "int8"),
        ("ct-fp8-dynamic", "float8 by channel, dynamic float8 activations", "fp8"),
        ("gptq-w4-actorder", "gptq, 4 bits in groups of 128, act-order", "int4, groups of 128; 8 gather"),
    ],
)
def test_a_folder_of_another_tool_is_explained_in_the_terminal(
    folder: str,
    stored: str,
    kept: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if not INTERCHANGE.is_dir():
        pytest.skip("shared/models/interchange is not beside this checkout")
    out, err = inspected(monkeypatch, capsys, str(INTERCHANGE / folder), "--linears")
    assert stored in out and kept in out and out.count("_proj ") == 14
    assert ("stored less one (gptq)" in err) is ("gptq" in folder)
    as_json = json.loads(inspected(monkeypatch, capsys, str(INTERCHANGE / folder), "--json")[0])
    assert as_json["linears"] == [] and stored in as_json["config"]["stored"]["words"]
    assert load_model_config(INTERCHANGE / folder).stored is not None


def test_linears_of_what_has_none_in_few_bits_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["sailfish", "inspect", "books-4m", "--linears"])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    assert "is quantised" in capsys.readouterr().err
