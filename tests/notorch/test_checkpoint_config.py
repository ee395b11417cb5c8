"""config.json of every family, in the classic form and in the newer one, and what is refused."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from checkpoint_fixtures import base_config, write_checkpoint, write_json
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sailfish.base.errors import CheckpointError, UnsupportedModelError
from sailfish.checkpoint.families import FAMILIES
from sailfish.checkpoint.hf_config import load_generation_defaults, load_model_config
from sailfish.checkpoint.model_config import GenerationDefaults, ModelConfig, MoeConfig, RopeConfig
from sailfish.checkpoint.names import tensor_specs

PLAIN = RopeConfig(theta=10_000.0, rotary_dim=8)
LLAMA3 = {
    "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32
}  # fmt: skip
YARN = {"factor": 4.0, "original_max_position_embeddings": 32}


def load(tmp_path: Path, model_type: str = "llama", **extra: Any) -> ModelConfig:
    write_json(tmp_path / "config.json", base_config(model_type, **extra))
    return load_model_config(tmp_path)


def refusal(tmp_path: Path, model_type: str = "llama", **extra: Any) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        load(tmp_path, model_type, **extra)
    assert "\n" not in str(caught.value) and "config.json" in str(caught.value)
    return caught.value


def windows(config: ModelConfig) -> list[int | None]:
    return [layer.window_tokens for layer in config.layers]


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_every_family_is_read_from_keys_that_all_share(tmp_path: Path, model_type: str) -> None:
    config = load(tmp_path, model_type)
    assert (config.family, config.d_model, config.n_heads, config.n_kv_heads) == (model_type, 32, 4, 2)
    assert (config.head_dim, config.d_mlp, config.vocab_size, config.context_tokens) == (8, 48, 64, 128)
    assert config.n_layers == 2 and config.dtype == "float32"


@pytest.mark.parametrize("model_type", sorted(FAMILIES.keys() - {"gemma3_text"}))
def test_both_forms_of_rope_mean_the_same(tmp_path: Path, model_type: str) -> None:
    classic = load(tmp_path, model_type, rope_theta=5e5, rope_scaling={"type": "llama3", **LLAMA3})
    newer = load(tmp_path, model_type, rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3})
    assert classic == newer
    rope = classic.layers[0].rope
    assert (rope.theta, rope.scaling, rope.factor, rope.original_context_tokens) == (5e5, "llama3", 8.0, 32)


def test_llama_has_no_extras_unless_its_config_says_so(tmp_path: Path) -> None:
    config = load(tmp_path)
    assert config.layers[0].rope == PLAIN and windows(config) == [None, None]
    assert not (config.qkv_bias or config.o_bias or config.mlp_bias or config.tied_head or config.qk_norm)
    config = load(tmp_path, attention_bias=True, mlp_bias=True, tie_word_embeddings=True)
    assert config.qkv_bias and config.o_bias and config.mlp_bias and config.tied_head


def test_llama_1_configs_without_kv_heads_and_head_dim_are_read(tmp_path: Path) -> None:
    config = load(tmp_path, num_key_value_heads=..., head_dim=...)
    assert (config.n_kv_heads, config.head_dim) == (4, 8)


def test_mistral_has_one_window_and_null_means_none(tmp_path: Path) -> None:
    assert windows(load(tmp_path, "mistral")) == [4096, 4096]
    assert windows(load(tmp_path, "mistral", sliding_window=16)) == [16, 16]
    assert windows(load(tmp_path, "mistral", sliding_window=None)) == [None, None]
    assert windows(load(tmp_path, "mixtral")) == [None, None]


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3"])
def test_qwen_windows_begin_at_max_window_layers_and_only_if_used(tmp_path: Path, model_type: str) -> None:
    keys = {"sliding_window": 16, "max_window_layers": 1}
    assert windows(load(tmp_path, model_type, **keys)) == [None, None]
    assert windows(load(tmp_path, model_type, use_sliding_window=True, **keys)) == [None, 16]
    types = ["sliding_attention", "full_attention"]
    assert windows(load(tmp_path, model_type, use_sliding_window=True, layer_types=types, **keys)) == [
        16,
        None,
    ]


def test_qwen_families_differ_in_biases_and_head_norms(tmp_path: Path) -> None:
    qwen2, qwen3 = load(tmp_path, "qwen2"), load(tmp_path, "qwen3")
    assert (qwen2.qkv_bias, qwen2.o_bias, qwen2.qk_norm) == (True, False, False)
    assert (qwen3.qkv_bias, qwen3.o_bias, qwen3.qk_norm) == (False, False, True)
    assert load(tmp_path, "qwen3", head_dim=...).head_dim == 128


def test_glm4_rotates_half_of_each_head_in_pairs(tmp_path: Path) -> None:
    config = load(tmp_path, "glm4")
    assert config.layers[0].rope == RopeConfig(theta=10_000.0, rotary_dim=4, interleaved=True)
    assert (config.qkv_bias, config.o_bias, config.sandwich_norms) == (True, False, True)
    assert config.norm_eps == 1.5625e-07 and not config.norm_plus_one
    assert load(tmp_path, "glm4", partial_rotary_factor=0.25).layers[0].rope.rotary_dim == 2


def test_gemma2_alternates_and_caps(tmp_path: Path) -> None:
    config = load(tmp_path, "gemma2", num_hidden_layers=3, sliding_window=16, query_pre_attn_scalar=64)
    assert windows(config) == [16, None, 16]
    assert (config.attention_softcap, config.logit_softcap) == (50.0, 30.0)
    assert config.softmax_scale == 64**-0.5 and config.embed_scale == math.sqrt(32)
    assert config.norm_plus_one and config.sandwich_norms and config.tied_head
    assert config.activation == "gelu_tanh"
    off = load(tmp_path, "gemma2", attn_logit_softcapping=None, final_logit_softcapping=None)
    assert off.attention_softcap is None and off.logit_softcap is None


def test_gemma3_local_and_global_layers_rotate_differently_in_both_forms(tmp_path: Path) -> None:
    classic = load(
        tmp_path, "gemma3_text", num_hidden_layers=6, sliding_window=16, rope_theta=1e6,
        rope_local_base_freq=1e4, sliding_window_pattern=3,
        rope_scaling={"rope_type": "linear", "factor": 8.0},
    )  # fmt: skip
    newer = load(
        tmp_path, "gemma3_text", num_hidden_layers=6, sliding_window=16,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"] * 2,
        rope_parameters={
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    )  # fmt: skip
    assert classic == newer
    assert windows(classic) == [16, 16, None] * 2
    assert classic.layers[0].rope == PLAIN
    assert classic.layers[2].rope == RopeConfig(theta=1e6, rotary_dim=8, scaling="linear", factor=8.0)
    assert classic.qk_norm and classic.norm_plus_one and classic.attention_softcap is None


def test_experts_replace_the_mlp_where_the_config_says(tmp_path: Path) -> None:
    config = load(tmp_path, "qwen3_moe", num_hidden_layers=4, decoder_sparse_step=2, mlp_only_layers=[3])
    moe = MoeConfig(n_experts=4, n_active=2, d_mlp=16, normalise_topk=False)
    assert [layer.moe for layer in config.layers] == [None, moe, None, None]
    renamed = load(tmp_path, "qwen3_moe", num_experts=..., num_local_experts=4, norm_topk_prob=True)
    assert renamed.layers[0].moe == MoeConfig(n_experts=4, n_active=2, d_mlp=16, normalise_topk=True)
    mixtral = load(tmp_path, "mixtral").layers[1]
    assert mixtral.moe == MoeConfig(n_experts=4, n_active=2, d_mlp=48, normalise_topk=True)
    assert mixtral.rope.theta == 1e6


def test_yarn_scales_cos_and_sin_by_its_paper_or_as_told(tmp_path: Path) -> None:
    def factor(**extra: Any) -> float:
        rope = load(tmp_path, rope_scaling={"rope_type": "yarn", **YARN, **extra}).layers[0].rope
        assert rope.scaling == "yarn" and rope.factor == 4.0 and rope.original_context_tokens == 32
        return rope.attention_factor

    assert factor() == pytest.approx(0.1 * math.log(4) + 1)
    assert factor(attention_factor=1.5) == 1.5
    assert factor(mscale=2.0, mscale_all_dim=1.0) == pytest.approx(
        (0.2 * math.log(4) + 1) / (0.1 * math.log(4) + 1)
    )
    inferred = load(tmp_path, rope_scaling={"type": "yarn", "original_max_position_embeddings": 32})
    assert inferred.layers[0].rope.factor == 4.0


def yarn(factor: float, original: int) -> dict[str, Any]:
    return {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}


@pytest.mark.parametrize(
    ("stated", "scaling", "tokens"),
    [
        pytest.param(32768, yarn(4.0, 32768), 131072, id="Qwen2.5"),
        pytest.param(40960, yarn(4.0, 32768), 131072, id="Qwen3"),
        pytest.param(163840, yarn(40, 4096), 163840, id="DeepSeek-V3"),
        pytest.param(
            131072, {"type": "yarn", "original_max_position_embeddings": 4096}, 131072, id="inferred"
        ),
        pytest.param(32768, {"type": "yarn", "factor": 2.0}, 65536, id="of-the-stated"),
        pytest.param(16384, {"type": "linear", "factor": 4.0}, 16384, id="linear"),
        pytest.param(131072, {"rope_type": "llama3", **LLAMA3}, 131072, id="llama3"),
    ],
)
def test_the_context_is_the_one_that_yarn_makes(
    tmp_path: Path, stated: int, scaling: dict[str, Any], tokens: int
) -> None:
    assert load(tmp_path, max_position_embeddings=stated, rope_scaling=scaling).context_tokens == tokens
    newer = load(tmp_path, max_position_embeddings=stated, rope_parameters={"rope_theta": 1e4, **scaling})
    assert newer.context_tokens == tokens


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text"])
def test_two_ropes_are_read_only_if_they_mean_the_same(tmp_path: Path, model_type: str) -> None:
    def both(factor: float) -> dict[str, Any]:
        params: dict[str, Any] = {"rope_type": "linear", "factor": factor}
        if model_type == "gemma3_text":
            params = {"full_attention": params, "sliding_attention": {"rope_type": "default"}}
        return {"rope_scaling": {"type": "linear", "factor": 8.0}, "rope_parameters": params}

    rope = load(tmp_path, model_type, layer_types=["full_attention"] * 2, **both(8)).layers[0].rope
    assert rope.factor == 8.0
    error = refusal(tmp_path, model_type, **both(4))
    assert "rope_scaling and rope_parameters differ in factor: 8.0 and 4.0 (say it once" in str(error)


def test_dtype_comes_from_either_key_or_from_the_weights(tmp_path: Path) -> None:
    assert load(tmp_path, dtype=..., torch_dtype="bfloat16").dtype == "bfloat16"
    assert load(tmp_path, dtype="torch.float16").dtype == "float16"
    write_checkpoint(tmp_path, {"a": ("BF16", (100,)), "b": ("F32", (10,))})
    assert load(tmp_path, dtype=...).dtype == "bfloat16"


def test_generation_config_goes_before_config_for_end_tokens(tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", base_config("llama", eos_token_id=2, bos_token_id=1))
    assert load_generation_defaults(tmp_path) == (GenerationDefaults(), (2,), 1)
    generation = {"eos_token_id": [3, 5, 99], "temperature": 0.6, "top_p": 0.9, "top_k": 0, "max_length": 20}
    write_json(tmp_path / "generation_config.json", generation)
    defaults, eos_token_ids, _ = load_generation_defaults(tmp_path)
    assert defaults == GenerationDefaults(temperature=0.6, top_p=0.9)
    assert eos_token_ids == (3, 5, 99)
    assert load_model_config(tmp_path).eos_token_ids == (3, 5)  # 99 is outside the vocabulary of 64


@pytest.mark.parametrize(
    ("generation", "words"),
    [
        ({"temperature": "hot"}, "temperature is 'hot'; it must be a number from 0 to 2"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"top_k": 2.5}, "top_k is 2.5; it must be an integer"),
        ({"eos_token_id": -1}, "eos_token_id is -1"),
        ({"eos_token_id": [1, "2"]}, "eos_token_id is [1, '2']; it must be a list of token ids"),
    ],
)
def test_wrong_generation_defaults_are_named(tmp_path: Path, generation: dict[str, Any], words: str) -> None:
    write_json(tmp_path / "config.json", base_config("llama"))
    write_json(tmp_path / "generation_config.json", generation)
    with pytest.raises(CheckpointError) as caught:
        load_generation_defaults(tmp_path)
    assert words in str(caught.value) and "generation_config.json" in str(caught.value)


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({"hidden_size": ...}, "lacks 'hidden_size', which must be an integer from 1 to 262144"),
        ({"hidden_size": 0}, "hidden_size is 0; it must be an integer"),
        ({"hidden_size": 10**400}, "hidden_size is a number of many digits"),
        ({"hidden_size": 32.0}, "hidden_size is 32.0"),
        ({"hidden_size": True}, "hidden_size is True"),
        ({"num_hidden_layers": 10**6}, "num_hidden_layers is 1000000"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 is not a multiple of num_key_value_heads 3"),
        ({"head_dim": ..., "hidden_size": 33}, "hidden_size 33 is not a multiple of its 4 heads"),
        ({"head_dim": 7}, "head_dim is 7; it must be even"),
        ({"head_dim": 4096}, "head_dim is 4096"),
        ({"rms_norm_eps": 0}, "rms_norm_eps is 0"),
        ({"vocab_size": "64"}, "vocab_size is '64'"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings is 1; it must be true or false"),
        ({"max_position_embeddings": 1}, "max_position_embeddings is 1; it must be an integer from 2 to"),
        ({"max_position_embeddings": 0}, "max_position_embeddings is 0; it must be an integer from 2 to"),
        (
            {"max_position_embeddings": 2**27, "rope_scaling": {"rope_type": "yarn", "factor": 4}},
            "YaRN's factor makes a context of 536870912 tokens; it must be at most 134217728",
        ),
        ({"rope_theta": -1}, "rope_theta is -1"),
        ({"rope_theta": 1e300}, "rope_theta is 1e+300"),
        ({"rope_scaling": 3}, "rope_scaling is 3; it must be an object"),
        ({"rope_scaling": {"rope_type": "linear"}}, "rope_scaling lacks 'factor'"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0}}, "factor is 0"),
        (
            {"rope_scaling": {"rope_type": "llama3", **LLAMA3, "high_freq_factor": 1.0}},
            "low_freq_factor 1 must be below high_freq_factor 1",
        ),
    ],
)  # fmt: skip
def test_values_out_of_range_are_named(tmp_path: Path, extra: dict[str, Any], words: str) -> None:
    error = refusal(tmp_path, **extra)
    assert words in str(error) and not isinstance(error, UnsupportedModelError)


@pytest.mark.parametrize(
    ("model_type", "extra", "words"),
    [
        ("gpt2", {}, "model_type is 'gpt2'; supported are gemma2, gemma3_text, glm4"),
        ("odd", {"auto_map": {"AutoModel": "m.M"}}, "its auto_map names Python code, which is never run"),
        ("gemma3", {"text_config": {}}, "wraps a text model in text_config"),
        ("llama", {"quantization_config": {"quant_method": "hqq"}}, "quant_method 'hqq'; read are gptq"),
        ("llama", {"hidden_act": "relu"}, "hidden_act is 'relu'; supported are silu"),
        ("gemma2", {"hidden_activation": "gelu"}, "hidden_activation is 'gelu'"),
        ("llama", {"dtype": "float8"}, "dtype is 'float8'"),
        ("llama", {"architectures": ["LlamaForSequenceClassification"]}, "only ...ForCausalLM is supported"),
        ("llama", {"partial_rotary_factor": 0.5}, "this family rotates whole heads"),
        ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type is 'dynamic'"),
        ("llama", {"rope_scaling": {"rope_type": "longrope"}}, "supported are default, linear, llama3, yarn"),
        ("llama", {"rope_parameters": {"rope_type": "default", "mrope_section": [2]}}, "mrope_section is"),
        ("llama", {"rope_parameters": {"full_attention": {}}}, "nested by layer type"),
        ("llama", {"rope_scaling": {"rope_type": "yarn", **YARN, "truncate": False}}, "truncate is false"),
        ("gemma3_text", {"rope_parameters": {"rope_theta": 1e4}}, "must be nested by layer type"),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "only causal models"),
    ],
)  # fmt: skip
def test_what_no_row_describes_is_refused_with_the_key_and_its_value(
    tmp_path: Path, model_type: str, extra: dict[str, Any], words: str
) -> None:
    error = refusal(tmp_path, model_type, **extra)
    assert isinstance(error, UnsupportedModelError) and words in str(error)


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({"layer_types": ["full_attention"]}, "layer_types has 1 entries for 2 layers"),
        ({"layer_types": ["linear", "linear"]}, "it must be a list of full_attention or sliding_attention"),
        ({"layer_types": ["sliding_attention"] * 2}, "names sliding_attention, but no window is set"),
    ],
)
def test_wrong_layer_types_are_named(tmp_path: Path, extra: dict[str, Any], words: str) -> None:
    assert words in str(refusal(tmp_path, "qwen3", **extra))


def test_code_in_a_known_family_is_ignored_and_said_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    load(tmp_path, auto_map={"AutoModel": "evil.Model"})
    assert "auto_map; it is ignored" in caplog.text


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", r"not valid JSON: .* \(mend it, or download it again\)"),
        ("[]", r"holds a JSON list, not an object \(mend it"),
        ('{"model_type":"llama","model_type":"x"}', "key 'model_type' stands twice"),
        ('{"a":' * 100_000, "nested too deeply"),
        ('{"rms_norm_eps": Infinity}', "Infinity is not a JSON number"),
        (" " * (2 << 20), "at most 1048576 are read"),
    ],
)
def test_a_config_that_is_no_plain_object_is_refused(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=words):
        load_model_config(tmp_path)


ODD = st.sampled_from(
    [None, 0, -1, 1, 2, 10**30, 1e308, -0.5, "", "x", [], [1], {}, {"rope_type": "yarn"}, True]
)
KEYS = [
    "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size", "rope_theta",
    "rope_scaling", "rope_parameters", "sliding_window", "layer_types", "max_window_layers", "dtype",
    "use_sliding_window", "sliding_window_pattern", "query_pre_attn_scalar", "final_logit_softcapping",
    "num_experts", "num_experts_per_tok", "mlp_only_layers", "decoder_sparse_step", "eos_token_id",
    "architectures", "quantization_config", "partial_rotary_factor", "num_hidden_layers", "bos_token_id",
]  # fmt: skip


@pytest.mark.slow
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    model_type=st.sampled_from(sorted(FAMILIES)),
    extra=st.dictionaries(st.sampled_from(KEYS), ODD, min_size=1, max_size=4),
)
def test_any_values_make_a_config_or_one_line(tmp_path: Path, model_type: str, extra: dict[str, Any]) -> None:
    try:
        config = load(tmp_path, model_type, **extra)
    except CheckpointError as error:
        assert "\n" not in str(error) and len(str(error)) < 1000
    else:
        assert len(tensor_specs(config)) > 2 * config.n_layers


def test_a_missing_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"config\.json is missing in .* \(check the path, or download all"
    ):
        load_model_config(tmp_path)
