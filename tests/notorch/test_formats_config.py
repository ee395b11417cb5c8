"""What quantization_config says of each linear, and what of it is refused in words."""

from __future__ import annotations

import copy
import time
from typing import Any

import pytest
from formats_fixtures import ACTIVATIONS, schemes
from hypothesis import given, settings
from hypothesis import strategies as st

from sailfish.base.errors import CheckpointError, ConfigError, UnsupportedModelError
from sailfish.checkpoint.formats.config import read_quant_config
from sailfish.checkpoint.formats.config_writer import write_quant_config
from sailfish.checkpoint.formats.patterns import check_pattern, matches
from sailfish.checkpoint.formats.scheme import LinearScheme, QuantConfig, Rule

UP, HEAD = "model.layers.3.mlp.up_proj", "lm_head"
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}
WEIGHTS = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128}


def packed(weights: dict[str, Any] | None = None, **group: Any) -> dict[str, Any]:
    one = {"targets": ["Linear"], "weights": WEIGHTS | (weights or {}), **group}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": one},
        "ignore": ["lm_head"],
    }


def read(values: dict[str, Any]) -> QuantConfig:
    return read_quant_config(values, "config.json")


V2 = LinearScheme(layout="gptq_v2", bits=4, strategy="group", group=128)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, LinearScheme(layout="gptq", bits=4, strategy="group", group=128)),
        ({"checkpoint_format": "gptq_v2"}, V2),
        ({"format": "gptq_v2"}, V2),
        ({"group_size": -1}, LinearScheme(layout="gptq", bits=4, strategy="channel")),
        ({"desc_act": True, "sym": False, "bits": 8},
         LinearScheme(layout="gptq", bits=8, strategy="group", group=128, symmetric=False, act_order=True)),
    ],
)  # fmt: skip
def test_a_gptq_config_names_one_scheme(change: dict[str, Any], expected: LinearScheme) -> None:
    config = read(GPTQ | change)
    assert config.scheme_of(UP) == expected
    assert config.scheme_of(HEAD) is None
    assert read(GPTQ | change | {"lm_head": True}).scheme_of(HEAD) == expected


def test_gptqmodels_dynamic_rules_go_before_the_rest() -> None:
    dynamic = {"-:.*mlp\\.down.*": {}, "+:.*up_proj$": {"bits": 8, "group_size": 64}}
    config = read(GPTQ | {"dynamic": dynamic})
    assert config.scheme_of(UP) == LinearScheme(layout="gptq", bits=8, strategy="group", group=64)
    assert config.scheme_of("model.layers.3.mlp.down_proj") is None
    assert config.scheme_of("model.layers.3.mlp.gate_proj") == read(GPTQ).scheme_of(UP)


def test_an_awq_config_may_use_either_spelling() -> None:
    expected = LinearScheme(layout="awq", bits=4, strategy="group", group=64, symmetric=False)
    old = {"quant_method": "awq", "w_bit": 4, "q_group_size": 64, "zero_point": True, "version": "GEMM"}
    config = read(old | {"modules_to_not_convert": ["visual", "mlp.gate_proj"]})
    assert config.scheme_of(UP) == expected == read(AWQ | {"group_size": 64}).scheme_of(UP)
    assert config.scheme_of("visual.blocks.0.up_proj") is None
    assert config.scheme_of("model.layers.0.mlp.gate_proj") is None
    assert config.scheme_of(HEAD) is None


def test_an_exact_name_goes_before_an_expression_and_that_before_a_class() -> None:
    def group(targets: list[str], bits: int) -> dict[str, Any]:
        return {"targets": targets, "weights": WEIGHTS | {"num_bits": bits}}

    values = packed()
    values["config_groups"] = {
        "a": group(["Linear"], 4),
        "b": group(["re:.*up_proj"], 3),
        "c": group([UP], 8),
    }
    config = read(values)
    bits = {
        name: scheme.bits if (scheme := config.scheme_of(name)) else None
        for name in (UP, HEAD, "x.up_proj", "q")
    }
    assert bits == {UP: 8, HEAD: None, "x.up_proj": 3, "q": 4}


def test_a_layer_that_no_target_names_is_dense() -> None:
    assert read(packed(targets=["re:.*down_proj"])).scheme_of(UP) is None
    assert read(packed(targets=["LlamaAttention"])).scheme_of(UP) is None
    assert read(packed() | {"ignore": ["re:.*up_proj"]}).scheme_of(UP) is None


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (GPTQ | {"quant_method": "fp8"}, "read are gptq, awq, compressed-tensors"),
        (GPTQ | {"quant_method": 4}, "quant_method"),
        (GPTQ | {"bits": 5}, "bits is 5"),
        (GPTQ | {"bits": True}, "bits is True"),
        (GPTQ | {"group_size": 0}, "group_size is 0"),
        (GPTQ | {"group_size": "128"}, "group_size is '128'"),
        (GPTQ | {"checkpoint_format": "marlin"}, "checkpoint_format is 'marlin'"),
        (GPTQ | {"pack_dtype": "int64"}, "pack_dtype is 'int64'"),
        (GPTQ | {"dynamic": {"+:(a+)+$": {}}}, "very long to match"),
        (AWQ | {"version": "gemv"}, "version is 'gemv'"),
        (AWQ | {"bits": 8}, "bits is 8"),
        (AWQ | {"modules_to_not_convert": [3]}, "modules_to_not_convert"),
        (packed({"num_bits": 16}), "does not hold 16 bits"),
        (packed({"type": "float"}), "of type 'float'"),
        (packed({"strategy": "block", "group_size": None}), "strategy is 'block'"),
        (packed({"group_size": None}), "strategy is 'group'"),
        (packed({"strategy": "tensor", "group_size": None, "symmetric": False}), "zero points"),
        (packed({"dynamic": True}), "dynamic is True"),
        (packed({"actorder": "sideways"}), "actorder is 'sideways'"),
        (packed(format="nvfp4-pack-quantized"), "format is 'nvfp4-pack-quantized'"),
        (packed(output_activations={"num_bits": 8}), "output_activations"),
        (packed(input_activations={"num_bits": 4}), "num_bits is '4 (int)'"),
        (packed(input_activations={"dynamic": "local"}), "dynamic is 'local'"),
        (packed(input_activations={"strategy": "token"}), "strategy is 'token'"),
        (packed(input_activations={"symmetric": False}), "symmetric is False"),
        (packed() | {"quantization_status": "frozen"}, "quantization_status is 'frozen'"),
        (packed() | {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config"),
        (packed() | {"transform_config": {"config_groups": {"u": {}}}}, "transform_config"),
        (packed() | {"config_groups": {}}, "lacks config_groups"),
        (packed() | {"config_groups": {"W4A16": ["Linear"]}}, "'W4A16' is the name of a scheme"),
        (packed() | {"ignore": ["re:("]}, "not a regular expression"),
        (packed() | {"ignore": ["x" * 501]}, "501 characters"),
        (packed() | {"ignore": ["in:x"]}, "in:"),
        (packed() | {"ignore": "lm_head"}, "ignore"),
        (packed() | {"format": "int-quantized"}, "int-quantized does not hold 4 bits"),
    ],
)  # fmt: skip
def test_what_is_not_read_is_refused_in_one_line(values: dict[str, Any], said: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        read(values)
    assert said in str(caught.value) and "config.json" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_keys_that_say_nothing_are_passed_over() -> None:
    dense = {"format": "dense", "global_sparsity": 0.1, "registry_requires_subclass": False}
    for more in (
        {"sparsity_config": dense},
        {"sparsity_config": {}, "transform_config": {"config_groups": None}},
    ):
        assert read(packed() | more) == read(packed())


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)
PATHS = [
    (values, path)
    for values in (GPTQ | {"dynamic": {"+:x": {"bits": 4}}, "checkpoint_format": "gptq"}, AWQ,
                   packed(input_activations={"num_bits": 8, "dynamic": True, "strategy": "token"}))
    for path in (*((key,) for key in values), ("dynamic", "+:x"), ("config_groups", "group_0"),
                 *(("config_groups", "group_0", key) for key in ("targets", "weights", "input_activations")),
                 *(("config_groups", "group_0", "weights", key) for key in (*WEIGHTS, "actorder", "dynamic")))
]  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(where=st.sampled_from(PATHS), value=JSON)
def test_whatever_a_config_holds_it_is_read_or_refused_in_one_line(where: Any, value: Any) -> None:
    values, path = where
    values = copy.deepcopy(values)
    inner = values
    for key in path[:-1]:
        inner = inner.setdefault(key, {})
    inner[path[-1]] = value
    try:
        config = read(values)
    except CheckpointError as error:
        assert "\n" not in str(error)
    else:
        config.scheme_of(UP)


@pytest.mark.parametrize(
    "pattern", ["re:(a+)+$", "re:(a|a)*$", "re:" + ".*" * 5, "re:(.)\\1", "re:(a?){40}a"]
)
def test_an_expression_that_could_take_very_long_is_refused(pattern: str) -> None:
    with pytest.raises(UnsupportedModelError, match="very long"):
        check_pattern(pattern, "config.json")


def test_the_worst_expression_that_is_read_is_quick() -> None:
    pattern = check_pattern("re:" + ".*" * 4 + "!", "config.json")
    started = time.process_time()
    assert not matches("model.layers.127.mlp.experts.127.down_proj", pattern)
    assert time.process_time() - started < 1


RULES = st.sampled_from(["re:.*up_proj$", "re:.*mlp\\.(gate|down)_proj", "re:model\\.layers\\.0\\..*"])


@st.composite
def configs(draw: st.DrawFn) -> QuantConfig:
    method = draw(st.sampled_from(["gptq", "awq", "compressed-tensors"]))
    if method == "gptq":
        layout = draw(st.sampled_from(["gptq", "gptq_v2"]))
        others = draw(st.dictionaries(RULES, st.none() | schemes((layout,))))
        rules = [Rule(targets=(pattern,), scheme=scheme) for pattern, scheme in others.items()]
        rules.append(Rule(targets=("Linear",), scheme=draw(schemes((layout,)))))
        return QuantConfig(
            method=method, rules=tuple(rules), ignore=draw(st.sampled_from([(), ("lm_head",)]))
        )
    if method == "awq":
        ignore = ("in:lm_head", *draw(st.sampled_from([(), ("in:visual",), ("in:a", "in:b.c")])))
        return QuantConfig(
            method=method, rules=(Rule(targets=("Linear",), scheme=draw(schemes(("awq",)))),), ignore=ignore
        )
    targets = st.lists(RULES | st.sampled_from(["Linear", UP]), min_size=1, max_size=3).map(tuple)
    stored = schemes(("pack-quantized", "int-quantized", "float-quantized"))
    return QuantConfig(
        method=method,
        rules=tuple(draw(st.lists(st.builds(Rule, targets=targets, scheme=stored), min_size=1, max_size=3))),
        ignore=draw(st.lists(RULES | st.just("lm_head"), max_size=2).map(tuple)),
        kv_cache=draw(st.none() | st.sampled_from([a for a in ACTIVATIONS if a.strategy == "tensor"])),
    )


@settings(max_examples=100, deadline=None)
@given(config=configs())
def test_a_config_written_and_read_is_the_same(config: QuantConfig) -> None:
    assert read(write_quant_config(config)) == config


def test_what_a_format_has_no_key_for_is_refused() -> None:
    scheme = LinearScheme(layout="gptq", bits=4, strategy="channel")
    linear = Rule(targets=("Linear",), scheme=scheme)
    for config in (
        QuantConfig(method="gptq", rules=(linear,), ignore=("re:.*up_proj",)),
        QuantConfig(method="gptq", rules=(Rule(targets=(UP,), scheme=scheme), linear)),
        QuantConfig(method="gptq", rules=(linear,), kv_cache=ACTIVATIONS[0]),
        QuantConfig(method="gptq", rules=()),
        QuantConfig(method="gptq", rules=(Rule(targets=("Linear",), scheme=None),)),
        QuantConfig(method="awq", rules=(linear, linear)),
        QuantConfig(method="compressed-tensors", rules=(Rule(targets=("Linear",), scheme=None),)),
    ):
        with pytest.raises(ConfigError):
            write_quant_config(config)
