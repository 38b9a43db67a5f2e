"""Tables, figures and pictures of races."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from training.planning import Race, best_rate
from training.results import Evaluation, Record
from training.targets import Metric, Target, best

COLORS = {
    "SGD": "#7f7f7f", "AdamW": "#0b6fa4", "Muon": "#4d8b31", "SOAP": "#8a4f9e",
    "Shampoo": "#c9a227", "K-FAC": "#d1651a", "K-FAC, default": "#e9a57a", "K-FAC, auto": "#c22f4a",
}  # fmt: skip
HEADINGS = ("", "rate", "seeds", "steps to target", "seconds to target", "best", "ms per step")


@dataclass(frozen=True)
class Standing:
    """A contender at its best learning rate, a value per seed; what was not reached is infinite.

    `at_edge` says that a learning rate outside the grid might be better.
    """

    contender: str
    records: Sequence[Record]
    learning_rate: float | None
    at_edge: bool
    steps: Sequence[float]
    seconds: Sequence[float]
    best: Sequence[float]
    milliseconds: Sequence[float]


def standings(race: Race, tuning_seed: int) -> list[Standing]:
    """One for every contender with a tuning run."""
    return [
        standing(name, records, race.target, tuning_seed)
        for name, records in race.records.items()
        if any(record.seed == tuning_seed for record in records)
    ]


def standing(name: str, records: Sequence[Record], target: Target, tuning_seed: int) -> Standing:
    tuning = [record for record in records if record.seed == tuning_seed]
    rate = best_rate(tuning, target)
    chosen = [record for record in records if record.learning_rate == rate]
    rates = [record.learning_rate for record in tuning if record.learning_rate is not None]
    firsts = [target.first(record) for record in chosen]
    return Standing(
        name,
        chosen,
        rate,
        len(rates) > 1 and rate in (min(rates), max(rates)),
        [first.step if first else math.inf for first in firsts],
        [first.seconds if first else math.inf for first in firsts],
        [best(target.metric, (e.value(target.metric) for e in r.evaluations)) for r in chosen],
        [1e3 * record.seconds_per_step for record in chosen],
    )


# --- tables ------------------------------------------------------------------------------------


def table(race: Race, description: str, tuning_seed: int) -> str:
    """Markdown: medians over the seeds, with the lowest and the highest in brackets."""
    lines = [
        f"{race.task}: {description}",
        f"target: {race.target}\n",
        "| " + " | ".join(HEADINGS) + " |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    rows = standings(race, tuning_seed)
    lines += ["| " + " | ".join(cells(row)) + " |" for row in rows]
    if any(row.at_edge for row in rows):
        lines.append("\n\\* at the edge of the grid")
    if race.skipped:
        lines += ["\nNot run:\n"]
        lines += [f"- {name}: {reason}" for name, reason in race.skipped.items()]
    failures = {name: failed(records) for name, records in race.records.items()}
    if any(failures.values()):
        lines.append("\nEnded early:\n")
        lines += [f"- {name}, {text}" for name, texts in failures.items() for text in texts]
    return "\n".join(lines)


def cells(row: Standing) -> list[str]:
    rate = "default" if row.learning_rate is None else f"{row.learning_rate:g}"
    return [
        row.contender,
        rate + ("\\*" if row.at_edge else ""),
        str(len(row.records)),
        spread(row.steps, "{:.0f}".format),
        spread(row.seconds, "{:.1f}".format),
        f"{median(row.best):.4g}",
        f"{median(row.milliseconds):.1f}",
    ]


def spread(values: Sequence[float], shown: Callable[[float], str]) -> str:
    def text(value: float) -> str:
        return shown(value) if math.isfinite(value) else "not reached"

    middle = text(median(values))
    if min(values) == max(values):
        return middle
    return f"{middle} ({text(min(values))} to {text(max(values))})"


def failed(records: Sequence[Record]) -> list[str]:
    """The runs that diverged or failed."""
    return [
        f"{'default' if r.learning_rate is None else f'lr {r.learning_rate:g}'}, "
        f"seed {r.seed}: {r.outcome}"
        for r in records
        if r.outcome not in ("target", "steps", "seconds")
    ]


def figures(race: Race, tuning_seed: int) -> dict[str, Any]:
    """The same for a JSON file, where what was not reached is null."""
    rows = {
        row.contender: {
            "learning_rate": row.learning_rate,
            "at_edge_of_grid": row.at_edge,
            "seeds": [record.seed for record in row.records],
            "steps_to_target": [finite(value) for value in row.steps],
            "seconds_to_target": [finite(value) for value in row.seconds],
            "median_steps": finite(median(row.steps)),
            "median_seconds": finite(median(row.seconds)),
            "best": list(row.best),
            "milliseconds_per_step": list(row.milliseconds),
            "package": row.records[0].configuration["package"],
            "tuning": [
                {
                    "learning_rate": record.learning_rate,
                    "steps_to_target": first.step if (first := race.target.first(record)) else None,
                    "outcome": record.outcome,
                }
                for record in race.records[row.contender]
                if record.seed == tuning_seed
            ],
        }
        for row in standings(race, tuning_seed)
    }
    target = {"metric": race.target.metric, "value": race.target.value}
    return {"target": target, "contenders": rows, "skipped": race.skipped}


def finite(value: float) -> float | None:
    """JSON has no infinity."""
    return value if math.isfinite(value) else None


# --- pictures ----------------------------------------------------------------------------------


def draw_race(path: Path, race: Race, tuning_seed: int) -> None:
    """Loss, and accuracy if there is one, against steps and seconds: a line per seed."""
    rows = standings(race, tuning_seed)
    has_accuracy = any(e.accuracy is not None for r in rows for e in r.records[0].evaluations)
    metrics: tuple[Metric, ...] = ("loss", "accuracy") if has_accuracy else ("loss",)
    figure = Figure(figsize=(11, 1 + 3.5 * len(metrics)), layout="constrained")
    axes = figure.subplots(len(metrics), 2, sharex="col", sharey="row", squeeze=False)
    for line, metric in zip(axes, metrics, strict=True):
        for axis, horizontal in zip(line, ("step", "seconds"), strict=True):
            for row in rows:
                draw_lines(axis, row, horizontal, metric)
            if metric == race.target.metric:
                axis.axhline(race.target.value, color="gray", linestyle="--", linewidth=1)
            if metric == "loss":
                axis.set_yscale("log")
            axis.grid(alpha=0.3, which="both")
        line[0].set_ylabel(metric)
    for axis, label in zip(axes[-1], ("steps", "training seconds"), strict=True):
        axis.set_xlabel(label)
    axes[0][1].legend(frameon=False, fontsize="small")
    figure.suptitle(f"{race.task}, target: {race.target}")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def draw_lines(axis: Axes, row: Standing, horizontal: str, metric: Metric) -> None:
    for number, record in enumerate(row.records):
        rows: Sequence[Evaluation] = record.evaluations
        axis.plot(
            [getattr(evaluation, horizontal) for evaluation in rows],
            [evaluation.value(metric) for evaluation in rows],
            color=COLORS[row.contender],
            linewidth=1.2,
            alpha=0.8,
            label=row.contender if number == 0 else None,
        )
