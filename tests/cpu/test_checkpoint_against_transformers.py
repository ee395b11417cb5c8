"""The checkpoint room beside transformers: the same defaults, tensor names, ids and chat texts."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from twins import TWINS, make_twin

from sailfish.checkpoint.families import FAMILIES
from sailfish.checkpoint.hf_config import load_model_config
from sailfish.checkpoint.model_config import ModelConfig
from sailfish.checkpoint.names import check_tensors, tensor_specs
from sailfish.checkpoint.safetensors_reader import Checkpoint
from sailfish.checkpoint.template import ChatTemplate, encode_chat
from sailfish.checkpoint.tokenizer import Tokenizer
from sailfish.models.layers.rope import rope_table

sys.path.insert(0, str(Path(__file__).parents[1] / "notorch"))
from checkpoint_fixtures import (
    base_config,
    byte_level_tokenizer,
    sentencepiece_like_tokenizer,
    write_json,
    write_tokenizer,
)

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
SLOW_FIXTURE = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def both(directory: Path, model_type: str, **extra: Any) -> tuple[ModelConfig, Any]:
    write_json(directory / "config.json", base_config(model_type, **extra))
    return load_model_config(directory), transformers.AutoConfig.from_pretrained(directory)


def their_windows(config: Any) -> list[int | None]:
    types = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    return [getattr(config, "sliding_window", None) if t == "sliding_attention" else None for t in types]


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_absent_keys_have_the_same_defaults(tmp_path: Path, model_type: str) -> None:
    ours, theirs = both(tmp_path, model_type, head_dim=..., num_hidden_layers=7)
    assert ours.norm_eps == theirs.rms_norm_eps
    assert ours.tied_head == theirs.tie_word_embeddings
    assert ours.head_dim == (getattr(theirs, "head_dim", None) or theirs.hidden_size // 4)
    act = getattr(theirs, "hidden_activation", None) or theirs.hidden_act
    assert ours.activation == {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}[act]
    assert [layer.window_tokens for layer in ours.layers] == their_windows(theirs)
    assert ours.attention_softcap == getattr(theirs, "attn_logit_softcapping", None)
    assert ours.logit_softcap == getattr(theirs, "final_logit_softcapping", None)
    if model_type != "qwen2":
        assert ours.qkv_bias == getattr(theirs, "attention_bias", False)
    for layer, kind in zip(ours.layers, getattr(theirs, "layer_types", None) or [None] * 7, strict=True):
        rope = theirs.rope_parameters.get(kind, theirs.rope_parameters)
        assert layer.rope.theta == rope["rope_theta"] and rope["rope_type"] == "default"
        assert layer.rope.rotary_dim == int(ours.head_dim * rope.get("partial_rotary_factor", 1.0))
    if ours.layers[0].moe:
        assert ours.layers[0].moe.normalise_topk == getattr(theirs, "norm_topk_prob", True)


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3"])
@pytest.mark.parametrize("first", [0, 2, 28])
def test_windows_begin_at_the_same_layer(tmp_path: Path, model_type: str, first: int) -> None:
    keys = {"sliding_window": 16, "use_sliding_window": True, "max_window_layers": first}
    ours, theirs = both(tmp_path, model_type, num_hidden_layers=5, **keys)
    assert [layer.window_tokens for layer in ours.layers] == their_windows(theirs)


@pytest.mark.parametrize("pattern", [1, 2, 6])
def test_gemma3_patterns_agree(tmp_path: Path, pattern: int) -> None:
    ours, theirs = both(tmp_path, "gemma3_text", num_hidden_layers=7, sliding_window_pattern=pattern)
    assert [layer.window_tokens for layer in ours.layers] == their_windows(theirs)


@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"factor": None},
        {"attention_factor": 1.25},
        {"mscale": 1.0, "mscale_all_dim": 0.7},
        {"mscale": 1.0},
        {"beta_fast": 16, "beta_slow": 2},
    ],
)
def test_yarn_attention_factors_agree(tmp_path: Path, extra: dict[str, Any]) -> None:
    scaling = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 16, **extra}
    ours, theirs = both(tmp_path, "llama", rope_theta=1e4, rope_scaling=scaling)
    _, factor = ROPE_INIT_FUNCTIONS["yarn"](theirs)
    assert ours.layers[0].rope.attention_factor == pytest.approx(factor)


@pytest.mark.parametrize(
    ("model_type", "stated"), [("qwen2", 32768), ("qwen3", 40960), ("llama", 32768), ("llama", 131072)]
)
def test_yarn_rotates_as_theirs_does_to_the_end_of_the_longer_context(
    tmp_path: Path, model_type: str, stated: int
) -> None:
    """Qwen2.5's and Qwen3's published form: the context is four times the original 32768."""
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    ours, theirs = both(
        tmp_path, model_type, max_position_embeddings=stated, head_dim=128, hidden_size=512,
        rope_theta=1e6, rope_scaling=scaling,
    )  # fmt: skip
    assert ours.context_tokens == 131072
    table_C2F = rope_table(ours.layers[0].rope, ours.context_tokens, torch.device("cpu"))
    positions = torch.tensor([[0, 1, stated - 1, stated, 100_000, 131_071]]).clamp(max=131_071)
    cos, sin = LlamaRotaryEmbedding(theirs)(torch.zeros(1), positions)
    expected = torch.stack((cos[0, :, :64], sin[0, :, :64]), dim=1)
    # the last bit of a float32 angle of 1e5 radians is 1/128
    torch.testing.assert_close(table_C2F[positions[0]], expected, rtol=0, atol=1 / 64)


@pytest.mark.parametrize("family", sorted(TWINS))
def test_what_save_pretrained_writes_is_accepted_whole(tmp_path: Path, family: str) -> None:
    path = make_twin(family, tmp_path)
    checkpoint = Checkpoint.open(path)
    config = load_model_config(path)
    check_tensors(config, checkpoint)
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    specs = tensor_specs(config)
    ours = sum(checkpoint.tensors[source].n_bytes // 4 for spec in specs for source in spec.sources)
    assert ours == sum(parameter.numel() for parameter in model.parameters())
    name = "model.layers.0.self_attn.k_proj.weight"
    assert bytes(checkpoint.bytes(name)) == model.get_parameter(name).detach().numpy().tobytes()


TOKENIZERS = {
    "byte_level": (byte_level_tokenizer, {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>"}),
    "byte_level_surrounded": (
        lambda: byte_level_tokenizer("<|endoftext|>", "<|im_end|>"),
        {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>", "add_bos_token": False},
    ),
    "sentencepiece": (
        sentencepiece_like_tokenizer,
        {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    ),
}


@pytest.fixture(params=sorted(TOKENIZERS))
def tokenizer_dir(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    make, config = TOKENIZERS[request.param]
    config = {**config, "tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    return write_tokenizer(tmp_path, make(), **config)


def test_ids_and_texts_agree(tokenizer_dir: Path) -> None:
    ours, theirs = Tokenizer.load(tokenizer_dir), transformers.AutoTokenizer.from_pretrained(tokenizer_dir)
    assert (ours.bos_token, ours.eos_token) == (theirs.bos_token, theirs.eos_token)

    @SLOW_FIXTURE
    @given(text=TEXT | st.sampled_from(["a</s>b <s>", "the<|im_end|><|endoftext|> the"]))
    def check(text: str) -> None:
        ids = theirs.encode(text)
        assert ours.encode(text, special=True) == ids
        assert ours.encode(text, special=True, add_special=False) == theirs.encode(
            text, add_special_tokens=False
        )
        assert ours.encode(text) == theirs(text, split_special_tokens=True)["input_ids"]
        for skip in (True, False):
            assert ours.decode(ids, skip_special=skip) == theirs.decode(ids, skip_special_tokens=skip)

    check()


TEMPLATES = {
    "chatml": (
        "{%- for m in messages %}\n"
        "    {{- '<|im_start|>' ~ m.role ~ '\\n' ~ m.content | trim ~ '<|im_end|>\\n' }}\n"
        "{%- endfor %}\n"
        "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
    ),
    "with_bos": (
        "{{ bos_token }}{% for m in messages %}\n"
        "  {% if m.role == 'user' %}[INST] {{ m.content }} [/INST]\n"
        "{% else %}{{ m.content }}{{ eos_token }}{% endif %}\n"
        "{% endfor %}"
    ),
    "json": (
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% if loop.index > 3 %}{% break %}{% endif %}"
        "{% set ns.n = ns.n + 1 %}{% generation %}{{ m | tojson(indent=1) }}{% endgeneration %}{% endfor %}"
        "{{ ns.n }}{% if thinking is defined and thinking %}<think>{% endif %}"
    ),
}  # fmt: skip


@pytest.fixture(params=sorted(TEMPLATES))
def chat(
    request: pytest.FixtureRequest, tokenizer_dir: Path
) -> Iterator[tuple[Tokenizer, ChatTemplate, Any]]:
    (tokenizer_dir / "chat_template.jinja").write_text(TEMPLATES[request.param])
    template = ChatTemplate.load(tokenizer_dir)
    assert template is not None
    yield Tokenizer.load(tokenizer_dir), template, transformers.AutoTokenizer.from_pretrained(tokenizer_dir)
    template.close()


def test_ordinary_conversations_get_the_same_ids(chat: tuple[Tokenizer, ChatTemplate, Any]) -> None:
    ours, template, theirs = chat

    @SLOW_FIXTURE
    @given(contents=st.lists(TEXT, min_size=1, max_size=4), prompt=st.booleans(), thinking=st.booleans())
    def check(contents: list[str], prompt: bool, thinking: bool) -> None:
        messages = [
            {"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)
        ]
        kwargs = {"thinking": thinking} if "thinking" in template.source else {}
        found = encode_chat(ours, template, messages, add_generation_prompt=prompt, template_kwargs=kwargs)
        expected = theirs.apply_chat_template(
            messages, add_generation_prompt=prompt, return_dict=False, **kwargs
        )
        assert found == expected

    check()


def test_books_4m_is_read_as_transformers_reads_it(tmp_path: Path) -> None:
    from sailfish.data import demo_model

    path = demo_model()
    ours, theirs = load_model_config(path), transformers.AutoConfig.from_pretrained(path)
    assert (ours.d_model, ours.n_layers, ours.norm_eps) == (256, 2, theirs.rms_norm_eps)
    text = json.dumps({"It was": "a dark and stormy night; naïve café 🎉"}, ensure_ascii=False)
    assert Tokenizer.load(path).encode(text) == transformers.AutoTokenizer.from_pretrained(path).encode(text)
