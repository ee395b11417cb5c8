"""Small checkpoints with linears in foreign formats, and transformers' models of their numbers."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor

from sailfish.checkpoint.formats.codec import layer_tensors, quantised_modules, read_linear, write_linear
from sailfish.checkpoint.formats.config import read_quant_config
from sailfish.checkpoint.formats.config_writer import write_quant_config
from sailfish.checkpoint.formats.linear import QuantisedLinear
from sailfish.checkpoint.formats.scheme import ActivationScheme, LinearScheme, QuantConfig, Rule
from sailfish.checkpoint.formats.writer import CheckpointWriter
from sailfish.checkpoint.safetensors_reader import Checkpoint, TensorRef

INT8 = LinearScheme(
    layout="int-quantized",
    bits=8,
    strategy="channel",
    activations=ActivationScheme(kind="int", dynamic=True, strategy="token"),
)
FP8 = replace(
    INT8,
    layout="float-quantized",
    activations=ActivationScheme(kind="float", dynamic=True, strategy="token"),
)
INT8_STATIC = replace(INT8, activations=ActivationScheme(kind="int", dynamic=False, strategy="tensor"))
FP8_STATIC = replace(FP8, activations=ActivationScheme(kind="float", dynamic=False, strategy="tensor"))
Schemes = Mapping[str, LinearScheme | None]
"""Expression of layers' module names, or "lm_head" -> how they are stored; the first that matches counts,
None: dense."""


def round_linear(weight_OI: NDArray[np.float32], scheme: LinearScheme, seed: int) -> QuantisedLinear:
    """Round a weight to what the scheme holds, by a rule as plain as can be; its inputs in any order."""
    n_out, n_in = weight_OI.shape
    group = scheme.group or n_in
    group_of_I = np.arange(n_in, dtype=np.int32) // group
    if scheme.act_order:
        group_of_I = np.random.default_rng(seed).permutation(group_of_I)
    n_groups = -(-n_in // group)
    largest = 448.0 if scheme.is_float else float((1 << (scheme.bits - 1)) - 1)
    low, high = (
        np.stack([f(weight_OI[:, group_of_I == g], axis=1) for g in range(n_groups)], axis=1)
        for f in (np.min, np.max)
    )
    scale_OG = np.maximum(-low, high) / largest if scheme.symmetric else (high - low) / (2 * largest + 1)
    if scheme.strategy == "tensor":
        scale_OG = np.full_like(scale_OG, scale_OG.max())
    scale_OG = scale_OG.astype(np.float16).astype(np.float32)
    zero_OG = (
        None if scheme.symmetric else np.round(-low / scale_OG).clip(0, 2 * largest + 1).astype(np.uint8)
    )
    scaled = weight_OI / scale_OG[:, group_of_I]
    if scheme.is_float:
        code_OI = torch.from_numpy(scaled).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    else:
        middle = (largest + 1) if zero_OG is None else zero_OG.astype(np.float32)[:, group_of_I]
        code_OI = np.round(scaled + middle).clip(0, 2 * largest + 1).astype(np.uint8)
    return QuantisedLinear(
        code_OI=np.ascontiguousarray(code_OI),
        scale_OG=scale_OG,
        zero_OG=zero_OG,
        g_idx=group_of_I.astype(np.int32) if scheme.act_order else None,
        group=group,
        bits=scheme.bits,
        scale_dtype="F16",
        is_float=scheme.is_float,
        input_scale=None
        if scheme.activations is None or scheme.activations.dynamic
        else np.array([(2 + seed % 3) / largest], np.float16).astype(np.float32),
    )


def store_twin(parent: Path, out: Path, schemes: Schemes, *, own_orders: bool = False) -> Path:
    """Write a dense checkpoint with its blocks' linears stored as the schemes say; return its folder.

    With act-order linears of the same inputs have them in one order, as tools leave them, or in their own.
    """
    layouts = {scheme.layout for scheme in schemes.values() if scheme is not None}
    is_gptq = any(layout.startswith("gptq") for layout in layouts)
    method = "gptq" if is_gptq else "awq" if layouts == {"awq"} else "compressed-tensors"
    tensors: dict[str, Tensor] = {}
    for file in parent.glob("*.safetensors"):
        tensors |= {name: tensor.float() for name, tensor in load_file(file).items()}
    dense = [] if "lm_head" in schemes else ["lm_head"]
    by_scheme: dict[LinearScheme, list[str]] = {}
    work = out.with_name(out.name + ".work")
    with CheckpointWriter(work) as writer:
        for number, (name, tensor) in enumerate(sorted(tensors.items())):
            module = name.removesuffix(".weight")
            seed = number if own_orders else sum(re.sub("[qkv]_proj|(gate|up)_proj", "x", module).encode())
            scheme = _scheme_of(module, schemes) if tensor.ndim == 2 else None
            if scheme is None:
                dense += [module] if tensor.ndim == 2 and ".layers." in name else []
                writer.copy(_ref(name, tensor), memoryview(tensor.contiguous().numpy().tobytes()))
                continue
            by_scheme.setdefault(scheme, []).append(module)
            linear = round_linear(tensor.numpy(), scheme, seed)
            for part, stored in write_linear(linear, scheme, module).items():
                writer.add(f"{module}.{part}", stored)
        rules = [Rule(targets=tuple(names), scheme=scheme) for scheme, names in by_scheme.items()]
        if method != "compressed-tensors":
            rules = [Rule(targets=("Linear",), scheme=next(iter(by_scheme)))]
            dense = ["in:lm_head"] if method == "awq" else ["lm_head"]
        config = QuantConfig(method=method, rules=tuple(rules), ignore=tuple(dense))
        values = json.loads((parent / "config.json").read_text(encoding="utf-8"))
        values["quantization_config"] = write_quant_config(config)
        writer.finish({"config.json": json.dumps(values).encode()})
    for file in parent.iterdir():
        if file.suffix == ".json" and not file.name.startswith(("config", "model")):
            shutil.copy(file, work)
    return work.rename(out)


def restored_by_hand(linear: QuantisedLinear) -> NDArray[np.float32]:
    """Return the weight, one input after the other."""
    columns = []
    for i in range(linear.shape[1]):
        g = i // linear.group if linear.g_idx is None else int(linear.g_idx[i])
        code_O = np.ascontiguousarray(linear.code_OI[:, i])
        if linear.is_float:
            value_O = torch.from_numpy(code_O).view(torch.float8_e4m3fn).float().numpy()
        else:
            zero_O = 1 << (linear.bits - 1) if linear.zero_OG is None else linear.zero_OG[:, g].astype(int)
            value_O = (code_O.astype(int) - zero_O).astype(np.float32)
        columns.append(value_O * linear.scale_OG[:, g])
    return np.stack(columns, axis=1)


def stored_linears(folder: Path) -> dict[str, tuple[LinearScheme, QuantisedLinear]]:
    """Return every quantised linear of a folder, by module, with its scheme."""
    checkpoint = Checkpoint.open(folder)
    values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config = read_quant_config(values["quantization_config"], "config.json")
    found = {}
    for module in quantised_modules(checkpoint.tensors):
        scheme = config.scheme_of(module)
        assert scheme is not None
        found[module] = scheme, read_linear(layer_tensors(checkpoint, module), scheme, module)
    return found


def stored_numbers(folder: Path) -> dict[str, tuple[LinearScheme, Tensor]]:
    """Return the numbers of every quantised linear of a folder, by module, with its scheme."""
    return {
        module: (scheme, torch.from_numpy(restored_by_hand(linear)))
        for module, (scheme, linear) in stored_linears(folder).items()
    }


def stored_truth(folder: Path, *, rounds_activations: bool) -> Any:
    """Return transformers' model of a folder in float32; 8-bit linears round their inputs if asked."""
    values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    del values["quantization_config"]
    config = transformers.AutoConfig.for_model(**values)
    model = transformers.AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation="eager"
    )
    linears = stored_linears(folder)
    state = {
        f"{module}.weight": torch.from_numpy(restored_by_hand(linear))
        for module, (_, linear) in linears.items()
    }
    for file in folder.glob("*.safetensors"):
        for name, tensor in load_file(file).items():
            if name.rpartition(".")[0] not in linears or name.endswith(".bias"):
                state[name] = tensor.float()
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    model.tie_weights()
    for module, (scheme, stored) in linears.items():
        if rounds_activations and scheme.activations is not None:
            linear = model.get_submodule(module)
            forward = _rounding(linear, 448.0 if scheme.is_float else 127.0, stored.input_scale)
            setattr(linear, "forward", forward)  # noqa: B010
    return model.eval()


def _rounding(
    linear: torch.nn.Linear, largest: float, static: NDArray[np.float32] | None
) -> Callable[[Tensor], Tensor]:
    """Return a linear whose inputs are rounded to 8 bits: all with one scale, or each token with its own."""

    def forward(x: Tensor) -> Tensor:
        scale = x.abs().amax(-1, keepdim=True) / largest
        scale = torch.where(scale == 0, 1.0, scale)
        if static is not None:
            scale = torch.from_numpy(static)
        if largest == 127.0:
            rounded = (x / scale).round().clamp(-128, 127)
        else:
            rounded = (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float()
        y = F.linear((rounded * scale).double(), linear.weight.double())
        return (y if linear.bias is None else y + linear.bias).to(x.dtype)

    return forward


def _scheme_of(module: str, schemes: Schemes) -> LinearScheme | None:
    if ".layers." not in module:
        return schemes.get(module)
    return next((scheme for pattern, scheme in schemes.items() if re.search(pattern, module)), None)


def _ref(name: str, tensor: Tensor) -> Any:
    n_bytes = tensor.numel() * tensor.element_size()
    return TensorRef(name=name, file="", dtype="F32", shape=tuple(tensor.shape), offset=0, n_bytes=n_bytes)
