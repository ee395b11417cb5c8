"""Side files of an engine: device overlays and evidence, each naming the manifest it belongs to."""

from __future__ import annotations

import logging
import os
import re
import tempfile
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from sailfish.artifact.reader import Artifact
from sailfish.base.errors import ArtifactError
from sailfish.plan.overlay import DeviceOverlay

EVIDENCE_FILE = "evidence.jsonl"
WEIGHT_ERROR = "weight_error"
"""Kind of evidence: mean of ||W - Wq|| / ||W|| over the quantised weights of each kind, such as "gate_up"."""
_MAX_SIDE_BYTES = 16 << 20
MAX_RUNTIME_BYTES = 4 << 30
"""No runtime takes more; a larger figure was another process's doing."""

log = logging.getLogger(__name__)


class Evidence(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One measured fact about an engine."""

    manifest: str
    """Digest of the engine it was measured on."""
    kind: str
    """Such as "perplexity" or "decode_speed"."""
    at: str
    """UTC, ISO 8601."""
    device: str
    values: dict[str, float | str]


class _OverlayFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    manifest: str
    overlay: DeviceOverlay


def read_overlay(artifact: Artifact, device_key: str, software: str) -> DeviceOverlay | None:
    """Return what was measured for this very engine on this kind of device with this software, or None.

    A damaged overlay counts as none, with a warning: the next start measures again.
    """
    path = _overlay_path(artifact, device_key)
    data = _read_side(path)
    if data is None:
        return None
    try:
        found = msgspec.json.decode(data, type=_OverlayFile)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        log.warning("%s is damaged and will be written again: %s", path, error)
        return None
    if not 0 <= found.overlay.runtime_bytes <= MAX_RUNTIME_BYTES:
        log.warning("%s says runtime_bytes %d and is ignored", path, found.overlay.runtime_bytes)
        return None
    is_ours = (found.manifest, found.overlay.software) == (artifact.digest, software)
    return found.overlay if is_ours else None


def write_overlay(artifact: Artifact, overlay: DeviceOverlay) -> Path:
    """Store what this device told, in one rename; raises ArtifactError where the directory is read-only."""
    path = _overlay_path(artifact, overlay.device_key)
    data = msgspec.json.encode(_OverlayFile(manifest=artifact.digest, overlay=overlay)) + b"\n"
    try:
        handle, temporary = tempfile.mkstemp(dir=artifact.directory, prefix=".overlay-")
        try:
            with os.fdopen(handle, "wb") as stream:
                stream.write(data)
                os.fsync(stream.fileno())
            os.replace(temporary, path)
        except OSError:
            Path(temporary).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise ArtifactError(f"{path} cannot be written: {error.strerror}") from None
    return path


def append_evidence(artifact: Artifact, kind: str, values: Mapping[str, float | str], *, device: str) -> None:
    """Append a line of what was measured just now; raises ArtifactError if it cannot be written."""
    evidence = Evidence(
        manifest=artifact.digest,
        kind=kind,
        at=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        device=device,
        values=dict(values),
    )
    path = artifact.directory / EVIDENCE_FILE
    line = msgspec.json.encode(evidence, order="sorted") + b"\n"
    try:
        with path.open("ab", buffering=0) as stream:
            stream.write(line)
            os.fsync(stream.fileno())
    except OSError as error:
        raise ArtifactError(f"{path} cannot be written: {error.strerror}") from None


def read_evidence(artifact: Artifact) -> list[Evidence]:
    """Return the evidence about this very engine, oldest first."""
    path = artifact.directory / EVIDENCE_FILE
    found = []
    for number, line in enumerate((_read_side(path) or b"").splitlines(), start=1):
        try:
            found.append(msgspec.json.decode(line, type=Evidence))
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise ArtifactError(
                f"{path}, line {number} is damaged: {error}", hint="delete that line"
            ) from None
    return [evidence for evidence in found if evidence.manifest == artifact.digest]


def _overlay_path(artifact: Artifact, device_key: str) -> Path:
    if not re.fullmatch(r"[a-z0-9_-]{1,80}", device_key):
        raise ArtifactError(f"device key {device_key[:80]!r} cannot name a file")
    return artifact.directory / f"overlay-{device_key}.json"


def _read_side(path: Path) -> bytes | None:
    try:
        if path.stat().st_size > _MAX_SIDE_BYTES:
            raise ArtifactError(f"{path} has more than {_MAX_SIDE_BYTES} bytes")
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {error.strerror}") from None
