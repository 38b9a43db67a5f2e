"""Tables and a picture of what steps cost."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from step_cost.stages import STAGES

COLORS = {
    "forward": "#b8c4ce", "backward": "#8295a5", "Fisher pass": "#4d8b31",
    "statistics A": "#0b6fa4", "statistics G": "#5db0dc", "statistics S": "#a5d8f0",
    "fold": "#8a4f9e", "refresh": "#c22f4a", "precondition": "#e8a33d", "update": "#d1651a",
}  # fmt: skip
MEBI = 2**20


def step_table(workload: Mapping[str, Any]) -> str:
    """Milliseconds of every class of steps, and the mean step beside the other optimizers'."""
    times = workload["milliseconds"]
    lines = [f"{'':<16}{'ms per step':>12}{'peak MiB':>12}"]
    names = {"SGD": "SGD", "AdamW": "AdamW", "ordinary": "K-FAC ordinary", "factor": "K-FAC factor"}
    for key, name in names.items():
        lines.append(f"{name:<16}{times[key]:>12.1f}{workload['memory'][key] / MEBI:>12.1f}")
    memory = workload["memory"]
    lines += [
        f"{'K-FAC refresh':<16}{'':>12}{memory['refresh'] / MEBI:>12.1f}",
        f"A factor step's peak is {memory['ratio']:.2f} of SGD's and the "
        f"{memory['curvature'] / MEBI:.1f} MiB of factors and inverses together.\n",
        f"{'K-FAC':<16}{'mean ms':>12}{'× SGD':>10}{'quartiles':>16}{'× AdamW':>10}"
        f"{'refreshes':>12}{'longest':>12}",
    ]
    for row in workload["periods"]:
        low, _, high = quartiles(row["over_by_round"]["SGD"])
        refreshes = next(part for part in row["classes"] if part["name"] == "refresh")
        share = refreshes["frequency"] * refreshes["milliseconds"]
        lines.append(
            f"{row['periods']:<16}{row['mean']:>12.1f}{row['over']['SGD']:>10.2f}"
            f"{f'{low:.2f} to {high:.2f}':>16}{row['over']['AdamW']:>10.2f}{share:>12.1f}"
            f"{row['longest']:>12.1f}"
        )
    return "\n".join(lines)


def quartiles(values: Sequence[float]) -> list[float]:
    return (
        statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [*values] * 3
    )


def stage_table(workload: Mapping[str, Any]) -> str:
    """Milliseconds of every stage, by class and in the mean step."""
    columns = dict(workload["stages"])
    columns |= {f"mean {row['periods']}": row["stages"] for row in workload["periods"]}
    lines = [f"{'stage, ms':<16}" + "".join(f"{name:>14}" for name in columns)]
    for stage in STAGES:
        values = [column[stage] for column in columns.values()]
        if any(values):
            lines.append(f"{stage:<16}" + "".join(f"{value:>14.2f}" for value in values))
    totals = (sum(column.values()) for column in columns.values())
    return "\n".join([*lines, f"{'sum':<16}" + "".join(f"{total:>14.2f}" for total in totals)])


def layer_table(row: Mapping[str, Any], count: int) -> str:
    """The layers that K-FAC spends most on, at some periods."""
    layers: Mapping[str, Mapping[str, float]] = row["layers"]
    stages = [stage for stage in STAGES if any(costs.get(stage) for costs in layers.values())]
    heading = f"layer, ms per step at {row['periods']}"
    lines = [f"{heading:<40}" + "".join(f"{name:>14}" for name in [*stages, "sum"])]
    ranked = sorted(layers, key=lambda name: -sum(layers[name].values()))
    for name in ranked[:count]:
        values = [layers[name].get(stage, 0.0) for stage in stages]
        lines.append(f"{name:<40}" + "".join(f"{v:>14.3f}" for v in [*values, sum(values)]))
    return "\n".join(lines)


def draw(path: Path, workloads: Mapping[str, Mapping[str, Any]], title: str) -> None:
    """Bars of stages for every optimizer; a tick marks the mean step measured without timers."""
    heights = [2 + len(workload["periods"]) for workload in workloads.values()]
    figure = Figure(
        figsize=(10, 1.2 + 0.45 * sum(heights) + 0.5 * len(heights)), layout="constrained"
    )
    panels = figure.subplots(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, workload in zip(panels, workloads.values(), strict=True):
        draw_bars(axes, workload)
    handles = {
        label: h
        for axes in panels
        for h, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    panels[-1].set_xlabel("milliseconds per step, mean over the schedule")
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=6, frameon=False)
    figure.suptitle(title, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def draw_bars(axes: Any, workload: Mapping[str, Any]) -> None:
    bars = {name: workload["stages"][name] for name in ("SGD", "AdamW")}
    totals = {name: workload["milliseconds"][name] for name in bars}
    for row in workload["periods"]:
        bars[f"K-FAC {row['periods']}"] = row["stages"]
        totals[f"K-FAC {row['periods']}"] = row["mean"]
    names, left = list(bars), [0.0] * len(bars)
    for stage in STAGES:
        widths = [bars[name][stage] for name in names]
        if any(widths):
            axes.barh(names, widths, left=left, color=COLORS[stage], label=stage, height=0.65)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    axes.plot(list(totals.values()), names, "k|", markersize=20, label="without stage timers")
    for name, total, end in zip(names, totals.values(), left, strict=True):
        ratio = total / totals["SGD"]
        axes.text(max(total, end), name, f"  {total:.4g} ms, {ratio:.2f}×", va="center", fontsize=8)
    axes.margins(x=0.15)
    axes.set_xlim(left=0)
    axes.invert_yaxis()
    axes.set_title(workload["description"], fontsize=10, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
