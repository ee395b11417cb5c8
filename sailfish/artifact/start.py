"""What an engine obeys when it starts: its build's settings overruled, and the plan made again."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import version

from sailfish.artifact.reader import Artifact
from sailfish.artifact.side import read_overlay
from sailfish.base.config import EngineConfig
from sailfish.base.errors import ConfigError
from sailfish.hardware.profile import HardwareProfile
from sailfish.kernels.contract import Choice
from sailfish.plan.formats import words
from sailfish.plan.make import make_plan
from sailfish.plan.ops import choose_ops
from sailfish.plan.overlay import DeviceOverlay
from sailfish.plan.strict import refuse_downgrades
from sailfish.plan.types import Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """A start that is about to happen."""

    plan: Plan
    ops: tuple[Choice, ...]
    overlay: DeviceOverlay | None
    """What an earlier start measured on this device."""
    downgrades: list[str]


def software() -> str:
    """Return what a measurement of the engine process depends on besides the device."""
    return f"torch {version('torch')}"


def plan_start(artifact: Artifact, asked: EngineConfig, hardware: HardwareProfile) -> Start:
    """Plan an engine's start. Raises PlanError when it does not fit or, with `strict`, is downgraded."""
    manifest = artifact.manifest
    config = manifest.requested.overruled_by(asked)
    overlay = read_overlay(artifact, hardware.key, software())
    plan = make_plan(config, manifest.model, hardware, overlay)
    if plan.formats != manifest.plan.formats:
        raise ConfigError(
            f"{artifact.directory} holds {words(manifest.plan.formats)} weights, asked for were "
            f"{words(plan.formats)}",
            hint="leave the formats of weights out, or build the engine again with them",
            param="weights",
        )
    # What a CPU runs depends on this machine too: on its instructions, and on a compiler being there.
    is_as_built = plan.target != "cpu" and _ask(plan) == _ask(manifest.plan)
    ops = manifest.ops if is_as_built else choose_ops(manifest.model, plan)
    return Start(plan=plan, ops=ops, overlay=overlay, downgrades=refuse_downgrades(config, plan, ops))


def _ask(plan: Plan) -> tuple[object, ...]:
    """Return what the choice of ops depends on."""
    return plan.target, plan.dtype, plan.formats, plan.kv_dtype, plan.page_tokens
