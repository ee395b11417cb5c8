"""`sailfish explain`: every setting and op, as asked for and as active, with the reason."""

from __future__ import annotations

from sailfish.artifact.contents import kinds
from sailfish.artifact.reader import Artifact
from sailfish.cli import opening, tables
from sailfish.cli.inspect import show_weights
from sailfish.cli.options import ENGINE, AsJson, Download, Model, Offline, Settings, with_settings
from sailfish.kernels.contract import Choice
from sailfish.plan import render
from sailfish.plan.ops import launches_saved


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
            "for": _what_for(choice),
            "implementation": choice.implementation,
            "why": choice.why,
            "declined": [f"{name}: {reason}" for name, reason in choice.declined],
        }
        for choice in start.ops
    ]
    launches = {} if start.overlay is None else start.overlay.launches
    unfused = {
        n_runs: sum(kernels.values())
        + launches_saved(manifest.model, start.plan.formats, start.ops, int(n_runs))
        for n_runs, kernels in launches.items()
    }
    data = {
        "target": manifest.target,
        "settings": decisions,
        "ops": ops,
        "launches": launches,
        "launches_one_by_one": unfused,
        "downgrades": start.downgrades,
        "weights": kinds(artifact),
        "quantised_by": manifest.quantised_by,
    }
    if as_json:
        tables.show_json(data)
        return
    show_weights(artifact)
    tables.show("Settings", tuple(decisions[0]), [tuple(map(str, row.values())) for row in decisions])
    rows = [
        (str(op["op"]), str(op["for"]), str(op["implementation"]), str(op["why"]), "\n".join(op["declined"]))
        for op in ops
    ]
    tables.show(f"Ops on {manifest.target}", ("op", "for", "implementation", "why", "declined"), rows)
    if launches:
        counts = [
            (f"up to {n_runs}", str(sum(kernels.values())), str(unfused[n_runs]), _counted(kernels))
            for n_runs, kernels in sorted(launches.items())
        ]
        tables.show(
            "Launches of a captured decode", ("sequences", "launches", "one by one", "kernels"), counts
        )
    for downgrade in start.downgrades:
        opening.say(f"downgrade: {downgrade}")


def _counted(kernels: dict[str, int]) -> str:
    """Return the kernels with their counts, the most frequent first."""
    ordered = sorted(kernels.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{n} x {name}" for name, n in ordered)


def _what_for(choice: Choice) -> str:
    """Return the shape of weight and the rows that a linear's choice is for."""
    if not choice.n_out:
        return ""
    rows = "more rows" if choice.max_rows is None else f"up to {choice.max_rows} rows"
    activation = f" and {choice.activation}" if choice.activation else ""
    return f"{choice.n_out} x {choice.n_in}{activation}, {rows}"
