"""A decoder with the little that reading one window at a time takes: a cache of a window, ops and weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from sailfish.artifact.reader import Artifact, StoredPiece
from sailfish.artifact.start import Start
from sailfish.base.errors import ConfigError
from sailfish.checkpoint.hf_config import load_model_config
from sailfish.checkpoint.model_config import ModelConfig
from sailfish.checkpoint.names import check_tensors, tensor_specs
from sailfish.checkpoint.safetensors_reader import Checkpoint
from sailfish.kernels.choose import bind
from sailfish.kernels.contract import Choice
from sailfish.models.arena import arena_layout
from sailfish.models.decoder import Decoder, KvCache, StepInputs
from sailfish.models.layers.linear import LinearWeight
from sailfish.models.load import CACHE_DTYPES, Piece, assemble, load_weights
from sailfish.plan.formats import arena_tensors
from sailfish.plan.ops import choose_all, op_cases
from sailfish.plan.types import CacheDtype, Dtype, WeightFormats
from sailfish.quality.windows import WINDOW_TOKENS

_PAGE_TOKENS = 64


class WindowModel:
    """A model that reads windows of text, each from an empty cache."""

    def __init__(
        self,
        config: ModelConfig,
        weights: Mapping[str, LinearWeight],
        ops: Sequence[Choice],
        *,
        kv_dtype: CacheDtype,
        page_tokens: int = _PAGE_TOKENS,
        window_tokens: int = WINDOW_TOKENS,
    ) -> None:
        """Take canonical weights of one device; windows have `window_tokens` tokens at most.

        Raises ConfigError where the model's context is shorter.
        """
        if window_tokens > config.context_tokens:
            raise ConfigError(
                f"windows of {window_tokens} tokens are longer than the model's context, "
                f"{config.context_tokens} tokens",
                hint="use shorter windows",
                param="window_tokens",
            )
        self.config = config
        self.window_tokens = window_tokens
        self._decoder = Decoder(config, weights, bind(ops), max_positions=window_tokens)
        norm = weights["final_norm.weight"]
        assert isinstance(norm, Tensor), "norms are dense in every format"
        self.device = norm.device
        n_blocks = -(-window_tokens // page_tokens)
        shape = (config.n_layers, 2, n_blocks, page_tokens, config.n_kv_heads, config.head_dim)
        cache = torch.zeros(shape, dtype=CACHE_DTYPES[kv_dtype], device=self.device)
        scales = torch.ones(shape[:-1], device=self.device) if kv_dtype in ("int8", "fp8") else None
        self._kv = KvCache.of(cache, scales)
        self._block_1W = torch.arange(n_blocks, dtype=torch.int32, device=self.device).unsqueeze(0)

    @classmethod
    def of_weights(
        cls,
        config: ModelConfig,
        weights: Mapping[str, LinearWeight],
        *,
        target: str = "cpu",
        dtype: Dtype = "float32",
        formats: WeightFormats | None = None,
        kv_dtype: CacheDtype | None = None,
        window_tokens: int = WINDOW_TOKENS,
    ) -> WindowModel:
        """Take weights that lie on the target's device, the plain ones in `dtype`, the others in `formats`.

        Without a `kv_dtype` keys and values are cached in `dtype`.
        """
        cases = op_cases(
            config,
            target=target,
            dtype=dtype,
            kv_dtype=kv_dtype or dtype,
            page_tokens=_PAGE_TOKENS,
            formats=formats or WeightFormats(),
        )
        return cls(
            config, weights, choose_all(cases), kv_dtype=kv_dtype or dtype, window_tokens=window_tokens
        )

    @classmethod
    def of_checkpoint(
        cls,
        directory: Path,
        *,
        target: str = "cpu",
        dtype: Dtype = "float32",
        kv_dtype: CacheDtype | None = None,
        window_tokens: int = WINDOW_TOKENS,
    ) -> WindowModel:
        """Read a dense checkpoint, its weights converted to `dtype`; raises CheckpointError."""
        checkpoint, config = Checkpoint.open(directory), load_model_config(directory)
        if config.stored is not None:
            raise ConfigError(
                f"{directory} is quantised: {config.stored.words}", hint="build an engine of it"
            )
        check_tensors(config, checkpoint)
        weights = _loaded(config, WeightFormats(), _pieces(checkpoint, config), target, dtype)
        return cls.of_weights(
            config, weights, target=target, dtype=dtype, kv_dtype=kv_dtype, window_tokens=window_tokens
        )

    @classmethod
    def of_engine(
        cls, engine: Artifact, *, start: Start | None = None, window_tokens: int = WINDOW_TOKENS
    ) -> WindowModel:
        """Read an engine as it would start, or as it was built: its formats, implementations and cache."""
        plan, config = engine.manifest.plan if start is None else start.plan, engine.manifest.model
        pieces = {tensor.name: tensor.pieces for tensor in engine.tensors()}
        return cls(
            config,
            _loaded(config, plan.formats, pieces, plan.target, plan.dtype),
            engine.manifest.ops if start is None else start.ops,
            kv_dtype=plan.kv_dtype,
            page_tokens=plan.page_tokens,
            window_tokens=window_tokens,
        )

    @torch.inference_mode()
    def hidden(self, tokens: Sequence[int]) -> Tensor:
        """Return hidden_TD after the final norm of a window's tokens."""
        assert 0 < len(tokens) <= self.window_tokens
        token_T = torch.tensor(tokens, dtype=torch.int64).to(self.device)
        return self._decoder.forward(StepInputs.of_window(token_T, self._block_1W), self._kv)

    @torch.inference_mode()
    def logits(self, hidden_SD: Tensor) -> Tensor:
        """Return logits_SV float32 of some rows of `hidden`."""
        return self._decoder.logits(hidden_SD).float()


def _pieces(checkpoint: Checkpoint, config: ModelConfig) -> dict[str, list[StoredPiece]]:
    found: dict[str, list[StoredPiece]] = {}
    for spec in tensor_specs(config):
        refs = [checkpoint.tensors[source] for source in spec.sources]
        found[spec.name] = [
            StoredPiece(
                path=checkpoint.directory / ref.file, offset=ref.offset, n_bytes=ref.n_bytes, dtype=ref.dtype
            )
            for ref in refs
        ]
    return found


def _loaded(
    config: ModelConfig,
    formats: WeightFormats,
    pieces: Mapping[str, Sequence[Piece]],
    target: str,
    dtype: Dtype,
) -> dict[str, LinearWeight]:
    tensors = arena_tensors(config, formats)
    _, n_bytes = arena_layout(tensors, dtype)
    arena = torch.zeros(n_bytes, dtype=torch.uint8, device="cpu" if target == "cpu" else "cuda")
    return assemble(config, formats, load_weights(tensors, pieces, arena, dtype))
