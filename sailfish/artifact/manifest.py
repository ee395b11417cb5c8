"""What an engine directory says of itself, as canonical JSON that is checked to the last number.

A manifest may come from anywhere, so nothing in it is believed: names stay inside the directory,
every piece lies inside its file, and every tensor is one that the model really has.
"""

from __future__ import annotations

import hashlib
import re
from math import prod

import msgspec

from sailfish.base.config import EngineConfig
from sailfish.base.errors import ArtifactError
from sailfish.checkpoint.model_config import GenerationDefaults, ModelConfig
from sailfish.checkpoint.names import FLOAT_DTYPES
from sailfish.kernels.contract import Choice
from sailfish.plan.formats import GROUPS, STORED_BYTES, arena_tensors, is_quantised
from sailfish.plan.types import Plan

FORMAT = 5
"""Version of the directory's format. A reader takes its own version only."""
MANIFEST_FILE = "manifest.json"
DIGEST_FILE = "manifest.sha256"
MAX_MANIFEST_BYTES = 64 << 20
_OWN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}", re.ASCII)
_SHA256 = re.compile(r"[0-9a-f]{64}", re.ASCII)
_MAX_LAYERS = 1024
_MAX_EXPERTS = 4096
_MAX_WIDTH = 1 << 24


class WeightFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A file that holds weights: the engine's own, or a checkpoint's that is left where it is."""

    path: str
    """Own: a plain name. Source: absolute, or relative to the engine directory."""
    is_source: bool
    n_bytes: int
    header_bytes: int
    """Leading bytes that `header_sha256` covers: a safetensors header, or 0 for the engine's own files."""
    header_sha256: str
    sha256: str
    """Of the whole file."""


class Piece(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Consecutive rows of a tensor as they lie in a file."""

    file: int
    """Index into `Manifest.weights`."""
    offset: int
    n_bytes: int
    dtype: str
    """As safetensors spells it, such as "BF16"."""


class TensorEntry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One tensor of the arena: its pieces, concatenated along the first axis.

    Where the model's specification says so its halves take turns in memory.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str | None
    """That it has in memory, as safetensors spells it; None: the plan's."""
    pieces: tuple[Piece, ...]


class FileEntry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A small file that was copied in, such as the tokenizer."""

    name: str
    n_bytes: int
    sha256: str


class Manifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything an engine is, but for the bytes of its weights."""

    format: int = FORMAT
    producer: str
    """Who wrote it, such as "sailfish 0.1.0"."""
    name: str
    """What the model is called."""
    model: ModelConfig
    generation: GenerationDefaults
    target: str
    """The hardware it was planned for."""
    requested: EngineConfig
    """What the build was asked for; the plan answers its autos."""
    plan: Plan
    ops: tuple[Choice, ...]
    """Implementations chosen for the target."""
    quantised_by: str | None
    """How the weights in 4 and 8 bits were made; None: there are none."""
    tensors: tuple[TensorEntry, ...]
    weights: tuple[WeightFile, ...]
    files: tuple[FileEntry, ...]


class _Version(msgspec.Struct):
    format: int


def encode(manifest: Manifest) -> bytes:
    """Return the canonical bytes: UTF-8, sorted keys, no spaces, a final newline."""
    return msgspec.json.encode(manifest, order="sorted") + b"\n"


def digest(data: bytes) -> str:
    """Return the engine digest: SHA-256 of the canonical bytes, in hex."""
    return hashlib.sha256(data).hexdigest()


def decode(data: bytes, where: str) -> Manifest:
    """Return the checked manifest in `data`; `where` names it in errors. Raises ArtifactError."""
    try:
        version = msgspec.json.decode(data, type=_Version).format
        if version != FORMAT:
            raise _wrong_version(version, where)
        manifest = msgspec.json.decode(data, type=Manifest)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ArtifactError(f"{where} is damaged: {error}", hint="build the engine again") from None
    try:
        same = encode(manifest) == data
    except (msgspec.EncodeError, UnicodeEncodeError, OverflowError):
        same = False
    if not same:
        raise ArtifactError(
            f"{where} is not in canonical form, so it was edited", hint="build the engine again"
        )
    check(manifest, where)
    return manifest


def check(manifest: Manifest, where: str) -> None:
    """Raise ArtifactError unless every name, offset and shape is sound."""
    reason = (
        _bad_model(manifest.model)
        or _bad_formats(manifest)
        or _bad_files(manifest)
        or _bad_tensors(manifest)
        or _bad_pieces(manifest)
    )
    if reason is not None:
        raise ArtifactError(f"{where} is not sound: {reason}", hint="build the engine again")


def _wrong_version(version: int, where: str) -> ArtifactError:
    if version > FORMAT:
        hint = "upgrade Sailfish, or build the engine again with this version"
    else:
        hint = "build the engine again"
    return ArtifactError(f"{where} has format {version}; this Sailfish reads format {FORMAT}", hint=hint)


def _bad_model(model: ModelConfig) -> str | None:
    """Bound the numbers before anything is computed from them."""
    if not 1 <= model.n_layers <= _MAX_LAYERS:
        return f"the model has {model.n_layers} layers"
    widths = ("d_model", "n_heads", "n_kv_heads", "head_dim", "d_mlp", "vocab_size")
    for name in widths:
        if not 1 <= getattr(model, name) <= _MAX_WIDTH:
            return f"{name} is {getattr(model, name)}"
    if not 1 <= model.context_tokens <= 1 << 31:
        return f"context_tokens is {model.context_tokens}"
    if model.n_heads % model.n_kv_heads:
        return f"{model.n_heads} heads do not divide by {model.n_kv_heads} key/value heads"
    for layer in model.layers:
        if layer.window_tokens is not None and layer.window_tokens < 1:
            return f"a window has {layer.window_tokens} tokens"
        if not 0 <= layer.rope.rotary_dim <= model.head_dim or layer.rope.rotary_dim % 2:
            return f"rotary_dim is {layer.rope.rotary_dim} of {model.head_dim}"
        moe = layer.moe
        if moe is not None and not (
            1 <= moe.n_active <= moe.n_experts <= _MAX_EXPERTS and 1 <= moe.d_mlp <= _MAX_WIDTH
        ):
            return f"a layer routes to {moe.n_active} of {moe.n_experts} experts of width {moe.d_mlp}"
    return None


def _bad_formats(manifest: Manifest) -> str | None:
    formats = manifest.plan.formats
    if formats.group not in GROUPS:
        return f"{formats.group} inputs share a scale"
    if formats.embedding not in ("plain", "int8"):
        return f"the embedding is in {formats.embedding}"
    if is_quantised(formats) != (manifest.quantised_by is not None):
        return "it is not clear who quantised its weights"
    return None


def _bad_files(manifest: Manifest) -> str | None:
    names = [file.name for file in manifest.files]
    names += [file.path for file in manifest.weights if not file.is_source]
    if len(set(names)) != len(names):
        return "a file is listed twice"
    for name in names:
        if not _OWN_NAME.fullmatch(name) or name in (MANIFEST_FILE, DIGEST_FILE):
            return f"{name[:80]!r} is no name for a file of an engine"
    for file in manifest.weights:
        if file.is_source and ("\0" in file.path or not file.path.endswith(".safetensors")):
            return f"the source {file.path[:80]!r} is not a safetensors file"
        if not 0 <= file.header_bytes <= file.n_bytes < 1 << 62:
            return f"{file.path[:80]!r} has {file.n_bytes} bytes and a header of {file.header_bytes}"
        if not (_SHA256.fullmatch(file.sha256) and _SHA256.fullmatch(file.header_sha256)):
            return f"{file.path[:80]!r} has a malformed digest"
    for entry in manifest.files:
        if not 0 <= entry.n_bytes < 1 << 62 or not _SHA256.fullmatch(entry.sha256):
            return f"{entry.name!r} has a malformed size or digest"
    return None


def _bad_tensors(manifest: Manifest) -> str | None:
    """The tensors must be exactly what the model's own become in the plan's formats."""
    wanted = {tensor.name: tensor for tensor in arena_tensors(manifest.model, manifest.plan.formats)}
    found = {tensor.name: tensor for tensor in manifest.tensors}
    if len(found) != len(manifest.tensors):
        return "a tensor is listed twice"
    for name, tensor in wanted.items():
        if name not in found:
            return f"tensor {name} is missing"
        if found[name].shape != tensor.shape:
            shape = list(found[name].shape)[:8]
            return f"tensor {name} has shape {shape}, the model needs {list(tensor.shape)}"
        if found[name].dtype != tensor.dtype:
            return f"tensor {name} is in {str(found[name].dtype)[:20]!r}, its format has {tensor.dtype!r}"
    extra = next((name for name in found if name not in wanted), None)
    return None if extra is None else f"the model has no tensor {extra[:80]!r}"


def _bad_pieces(manifest: Manifest) -> str | None:
    for tensor in manifest.tensors:
        n_elements = 0
        for piece in tensor.pieces:
            if piece.dtype not in (FLOAT_DTYPES if tensor.dtype is None else (tensor.dtype,)):
                return f"tensor {tensor.name} has a piece of dtype {piece.dtype[:20]!r}"
            item_bytes = STORED_BYTES[piece.dtype]
            if not 0 <= piece.file < len(manifest.weights):
                return f"tensor {tensor.name} names weight file {piece.file} of {len(manifest.weights)}"
            file = manifest.weights[piece.file]
            if piece.n_bytes <= 0 or piece.n_bytes % item_bytes or piece.offset < file.header_bytes:
                return f"tensor {tensor.name} has a piece of {piece.n_bytes} bytes at {piece.offset}"
            if piece.offset + piece.n_bytes > file.n_bytes:
                return f"tensor {tensor.name} ends at byte {piece.offset + piece.n_bytes} of {file.n_bytes}"
            n_elements += piece.n_bytes // item_bytes
        if n_elements != prod(tensor.shape):
            return f"tensor {tensor.name} has {n_elements} elements, its shape needs {prod(tensor.shape)}"
    return None
