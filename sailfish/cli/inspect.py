"""`sailfish inspect`: what a checkpoint or an engine directory holds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Annotated

import typer

from sailfish.artifact.contents import kinds
from sailfish.artifact.reader import Artifact, is_engine
from sailfish.artifact.side import WEIGHT_ERROR, read_evidence
from sailfish.base.errors import ConfigError
from sailfish.base.units import format_bytes
from sailfish.checkpoint.formats.explain import LinearFacts
from sailfish.checkpoint.inspect import CheckpointReport, inspect_checkpoint
from sailfish.checkpoint.model_config import ModelConfig
from sailfish.cli import opening, tables
from sailfish.cli.options import AsJson, Download, Model, Offline


def inspect(
    model: Model,
    each_linear: Annotated[
        bool, typer.Option("--linears", help="Read and explain each quantised linear of a checkpoint.")
    ] = False,
    as_json: AsJson = False,
    offline: Offline = False,
    download: Download = False,
) -> None:
    """Describe a checkpoint or an engine from its small files and headers.

    A checkpoint that another tool quantised is explained: its format, what an engine keeps of it, and
    what deserves a second look. Weights are read with --linears only.
    """
    directory = opening.locate(model, offline=offline, download=download)
    if is_engine(directory):
        if each_linear:
            raise ConfigError("--linears explains checkpoints, and this is an engine", hint="leave it out")
        artifact = Artifact.open(directory)
        if as_json:
            data = {
                "digest": artifact.digest,
                "manifest": artifact.manifest,
                "evidence": read_evidence(artifact),
                "weights": kinds(artifact),
            }
            tables.show_json(data)
        else:
            _show_engine(artifact)
        return
    report = inspect_checkpoint(directory, each_linear=each_linear)
    if each_linear and report.config.stored is None:
        raise ConfigError(f"no linear of {directory} is quantised", hint="leave --linears out")
    if as_json:
        tables.show_json(report)
    else:
        _show_checkpoint(report)


def _show_engine(artifact: Artifact) -> None:
    manifest = artifact.manifest
    weights = (
        "copied in" if all(not file.is_source for file in manifest.weights) else "left in the checkpoint"
    )
    tables.show(
        f"Engine {artifact.directory}",
        ("fact", "value"),
        [
            ("model", f"{manifest.name} ({manifest.model.family})"),
            ("digest", artifact.digest),
            ("target", manifest.target),
            ("dtype", manifest.plan.dtype),
            ("made by", manifest.producer),
            ("weights", f"{len(manifest.tensors)} tensors, {weights}"),
            ("quantised by", manifest.quantised_by or "nobody"),
        ],
    )
    show_weights(artifact)
    for evidence in read_evidence(artifact):
        if evidence.kind == WEIGHT_ERROR:
            continue
        facts = [(name, str(value)) for name, value in evidence.values.items()]
        title = f"Evidence: {evidence.kind}, {evidence.device}, {evidence.at}"
        tables.show(title, ("what", "value"), facts, right=("value",))
    rows = [(file.path, format_bytes(file.n_bytes), file.sha256) for file in manifest.weights]
    rows += [(file.name, format_bytes(file.n_bytes), file.sha256) for file in manifest.files]
    tables.show("Files", ("file", "size", "sha256"), rows, right=("size",))


def show_weights(artifact: Artifact) -> None:
    """Print what each kind of weight is stored in, and how far that is from the checkpoint."""
    tables.show(
        "Weights",
        ("kind", "tensors", "format", "bits per weight", "size", "relative error"),
        [
            (
                kind.name,
                str(kind.n_tensors),
                kind.format,
                f"{kind.bits:.4g}",
                format_bytes(kind.n_bytes),
                "" if kind.error is None else f"{kind.error:.2%}",
            )
            for kind in kinds(artifact)
        ],
        right=("tensors", "bits per weight", "size", "relative error"),
    )


def _show_checkpoint(report: CheckpointReport) -> None:
    config, tokenizer = report.config, report.tokenizer
    shape = f"width {config.d_model}, {config.n_layers} layers, {config.n_heads}/{config.n_kv_heads} heads"
    if tokenizer is None:
        token_facts = "none"
    else:
        token_facts = f"{tokenizer.vocab_size} tokens, {tokenizer.n_special_tokens} special"
    rows = [
        ("family", config.family),
        ("parameters", f"{report.n_parameters:,}"),
        ("shape", f"{shape}, MLP {config.d_mlp}, vocabulary {config.vocab_size}"),
        ("context", f"{config.context_tokens} tokens"),
        (
            "weights",
            ", ".join(f"{dtype} {format_bytes(size)}" for dtype, size in report.bytes_by_dtype.items()),
        ),
        *_stored_rows(config),
        ("tokenizer", token_facts),
        ("chat template", "yes" if report.has_chat_template else "no"),
    ]
    tables.show(f"Checkpoint {report.directory}", ("fact", "value"), rows)
    files = [(name, format_bytes(size)) for name, size in sorted(report.file_bytes.items())]
    tables.show("Files", ("file", "size"), files, right=("size",))
    if report.linears:
        _show_linears(report.linears)
    for warning in report.warnings:
        opening.say(f"warning: {warning}")


def _stored_rows(config: ModelConfig) -> list[tuple[str, str]]:
    stored = config.stored
    if stored is None:
        return []
    kept = f"{stored.format}, groups of {stored.group}" if stored.format == "int4" else stored.format
    kept = "nothing: all are restored" if stored.format == "plain" else kept
    for format, n in sorted(Counter(format for _, format in stored.others).items()):
        kept += f"; {n} of the layers' weights in {format}" if format != "plain" else f"; {n} are plain"
    kept += f"; {len(stored.ordered)} gather their inputs (act-order)" if stored.ordered else ""
    return [("quantised", stored.words), ("an engine keeps", kept)]


def _show_linears(linears: Sequence[LinearFacts]) -> None:
    rows = [
        (
            linear.name,
            f"{linear.layout}: {linear.words}",
            " x ".join(map(str, linear.shape)),
            f"{linear.bits:.4g}",
            "{:.3g} to {:.3g}".format(*linear.scale_range),
            "as it is" if linear.kept else "restored",
            "; ".join(linear.warnings),
        )
        for linear in linears
    ]
    columns = ("linear", "stored as", "shape", "bits per weight", "scales", "in an engine", "warnings")
    tables.show("Linears", columns, rows, right=("shape", "bits per weight", "scales"))
