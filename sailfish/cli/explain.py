"""`sailfish explain`: every setting and op, as asked for and as active, with the reason."""

from __future__ import annotations

from sailfish.artifact.reader import Artifact
from sailfish.cli import opening, tables
from sailfish.cli.options import ENGINE, AsJson, Download, Model, Offline, Settings, with_settings
from sailfish.plan import render


@with_settings(ENGINE)
def explain(
    model: Model,
    as_json: AsJson = False,
    offline: Offline = False,
    download: Download = False,
    *,
    settings: Settings,
) -> None:
    """Show what was asked, where that came from, what is active and why; and why each other op lost."""
    artifact = Artifact.open(opening.find(model, settings, offline=offline, download=download))
    manifest = artifact.manifest
    start = opening.start_of(artifact, settings.engine)
    used = {"moe": any(layer.moe for layer in manifest.model.layers), "softcap": manifest.model.logit_softcap}
    decisions = [
        {
            "setting": decision.name,
            "requested": decision.requested,
            "from": settings.origins.get(decision.name, "default"),
            "active": row.value,
            "why": row.why,
        }
        for decision, row in zip(start.plan.decisions, render.decision_rows(start.plan), strict=True)
    ]
    ops = [
        {
            "op": choice.op,
            "implementation": choice.implementation,
            "why": choice.why,
            "declined": [f"{name}: {reason}" for name, reason in choice.declined],
        }
        for choice in start.ops
        if used.get(choice.op, True)
    ]
    data = {
        "target": manifest.target,
        "settings": decisions,
        "ops": ops,
        "downgrades": start.downgrades,
    }
    if as_json:
        tables.show_json(data)
        return
    tables.show("Settings", tuple(decisions[0]), [tuple(map(str, row.values())) for row in decisions])
    rows = [
        (str(op["op"]), str(op["implementation"]), str(op["why"]), "\n".join(op["declined"])) for op in ops
    ]
    tables.show(f"Ops on {manifest.target}", ("op", "implementation", "why", "declined"), rows)
    for downgrade in start.downgrades:
        opening.say(f"downgrade: {downgrade}")
