"""Tables, figures and pictures of races, and ratios over all of them."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import geometric_mean, median
from typing import Any, Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from training.planning import Race, best_rate, fewest_steps
from training.results import BEHIND, Evaluation, Record
from training.targets import Metric, best

COLORS = {
    "SGD": "#7f7f7f", "AdamW": "#0b6fa4", "Muon": "#4d8b31", "SOAP": "#8a4f9e",
    "Shampoo": "#c9a227", "K-FAC": "#d1651a", "K-FAC, default": "#e9a57a", "K-FAC, auto": "#c22f4a",
}  # fmt: skip
HEADINGS = ("", "rate", "seeds", "steps to target", "seconds to target", "best", "ms per step")
FIRST_ORDER = ("SGD", "AdamW", "Muon")
OPPONENTS = (
    ("K-FAC, auto", FIRST_ORDER),
    ("K-FAC, auto", (*FIRST_ORDER, "SOAP", "Shampoo")),
    ("K-FAC, default", ("SGD",)),
)

Measure = Literal["steps", "seconds"]
MEASURES: tuple[Measure, ...] = ("steps", "seconds")


@dataclass(frozen=True)
class Standing:
    """The timed runs of a contender, a value per seed; what was not reached is infinite.

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

    def median(self, measure: Measure) -> float:
        return median(self.steps if measure == "steps" else self.seconds)


def standings(race: Race) -> list[Standing]:
    """One for every contender with timed runs."""
    return [standing(race, name, records) for name, records in race.timed.items() if records]


def standing(race: Race, name: str, records: Sequence[Record]) -> Standing:
    target = race.target
    rate = records[0].learning_rate
    firsts = [target.first(record) for record in records]
    return Standing(
        name,
        records,
        rate,
        at_edge(rate, race.tuning.get(name, ())),
        [first.step if first else math.inf for first in firsts],
        [first.seconds if first else math.inf for first in firsts],
        [best(target.metric, (e.value(target.metric) for e in r.evaluations)) for r in records],
        [1e3 * record.seconds_per_step for record in records],
    )


def at_edge(rate: float | None, tuning: Sequence[Record]) -> bool:
    rates = [record.learning_rate for record in tuning if record.learning_rate is not None]
    return len(rates) > 1 and rate in (min(rates), max(rates))


# --- tables ------------------------------------------------------------------------------------


def table(race: Race, description: str) -> str:
    """Markdown: medians over the seeds, with the lowest and the highest in brackets."""
    lines = [
        f"{race.task}: {description}",
        f"target: {race.target}\n",
        "| " + " | ".join(HEADINGS) + " |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    rows = standings(race)
    lines += ["| " + " | ".join(cells(row)) + " |" for row in rows]
    return "\n".join(lines + notes(race, any(row.at_edge for row in rows)))


def tuning_table(race: Race, description: str) -> str:
    """Markdown: the best learning rate of every contender that was tuned."""
    lines = [
        f"{race.task}: {description}",
        f"target: {race.target}\n",
        "| | best rate | steps to target |",
        "|---|---:|---:|",
    ]
    tuned = {name: records for name, records in race.tuning.items() if records}
    edges = []
    for name, records in tuned.items():
        rate = best_rate(records, race.target)
        steps = fewest_steps(records, race.target)
        edges.append(at_edge(rate, records))
        shown = "not reached" if steps is None else steps
        lines.append(f"| {name} | {rate_text(rate, edges[-1])} | {shown} |")
    return "\n".join(lines + notes(race, any(edges)))


def notes(race: Race, any_at_edge: bool) -> list[str]:
    lines = ["\n\\* at the edge of the grid"] if any_at_edge else []
    if race.skipped:
        lines += ["\nNot run:\n"]
        lines += [f"- {name}: {reason}" for name, reason in race.skipped.items()]
    failures = [
        f"- {name}, {text}"
        for runs in (race.tuning, race.timed)
        for name, records in runs.items()
        for text in failed(records)
    ]
    return [*lines, "\nEnded early:\n", *failures] if failures else lines


def cells(row: Standing) -> list[str]:
    return [
        row.contender,
        rate_text(row.learning_rate, row.at_edge),
        str(len(row.records)),
        spread(row.steps, "{:.0f}".format),
        spread(row.seconds, "{:.1f}".format),
        f"{median(row.best):.4g}",
        f"{median(row.milliseconds):.1f}",
    ]


def rate_text(rate: float | None, at_edge: bool = False) -> str:
    return ("default" if rate is None else f"{rate:g}") + ("\\*" if at_edge else "")


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
        f"{'tuning' if r.configuration['purpose'] == 'tuning' else f'seed {r.seed}'}: {r.outcome}"
        for r in records
        if r.outcome not in ("target", "steps", "seconds", BEHIND)
    ]


def figures(race: Race) -> dict[str, Any]:
    """The same for a JSON file, where what was not reached is null."""
    rows = {
        row.contender: {
            "learning_rate": row.learning_rate,
            "at_edge_of_grid": row.at_edge,
            "seeds": [record.seed for record in row.records],
            "steps_to_target": [finite(value) for value in row.steps],
            "seconds_to_target": [finite(value) for value in row.seconds],
            "median_steps": finite(row.median("steps")),
            "median_seconds": finite(row.median("seconds")),
            "best": list(row.best),
            "milliseconds_per_step": list(row.milliseconds),
            "package": row.records[0].configuration["package"],
            "tuning": [
                {
                    "learning_rate": record.learning_rate,
                    "steps_to_target": first.step if (first := race.target.first(record)) else None,
                    "steps": record.steps,
                    "outcome": record.outcome,
                }
                for record in race.tuning.get(row.contender, ())
            ],
        }
        for row in standings(race)
    }
    target = {"metric": race.target.metric, "value": race.target.value}
    return {"target": target, "contenders": rows, "skipped": race.skipped}


def finite(value: float) -> float | None:
    """JSON has no infinity."""
    return value if math.isfinite(value) else None


# --- ratios over all tasks ---------------------------------------------------------------------


@dataclass(frozen=True)
class Ratio:
    """How much the best rival needs of what we need.

    Infinite if no rival gets to the target, zero if we do not, nan if nobody does.
    """

    rival: str
    value: float

    def __str__(self) -> str:
        if math.isnan(self.value):
            return "reached by neither"
        if self.value in (0, math.inf):
            return "reached by us alone" if self.value else "not reached"
        return f"{self.value:.2f} ({self.rival})"


@dataclass(frozen=True)
class Comparison:
    """Medians of a contender against those of the best rival on each task."""

    contender: str
    rivals: Sequence[str]
    tasks: Mapping[str, Mapping[Measure, Ratio]]

    def both_reached(self, measure: Measure) -> list[float]:
        ratios = (task[measure].value for task in self.tasks.values())
        return [ratio for ratio in ratios if 0 < ratio < math.inf]

    def mean(self, measure: Measure) -> float | None:
        """Geometric, over the tasks with a ratio."""
        ratios = self.both_reached(measure)
        return geometric_mean(ratios) if ratios else None


def comparisons(races: Iterable[Race]) -> list[Comparison]:
    """Of those contenders and rivals that have been timed."""
    rows = {race.task: {row.contender: row for row in standings(race)} for race in races}
    found: list[Comparison] = []
    for ours, rivals in OPPONENTS:
        comparison = compare(rows, ours, rivals)
        if comparison.tasks and comparison not in found:
            found.append(comparison)
    return found


def compare(
    rows: Mapping[str, Mapping[str, Standing]], contender: str, rivals: Sequence[str]
) -> Comparison:
    tasks = {}
    for task, row in rows.items():
        others = [row[name] for name in rivals if name in row]
        if contender in row and others:
            tasks[task] = {measure: ratio(row[contender], others, measure) for measure in MEASURES}
    present = [name for name in rivals if any(name in rows[task] for task in tasks)]
    return Comparison(contender, present, tasks)


def ratio(ours: Standing, others: Iterable[Standing], measure: Measure) -> Ratio:
    rival = min(others, key=lambda row: row.median(measure))
    return Ratio(rival.contender, rival.median(measure) / ours.median(measure))


def comparison_table(comparison: Comparison) -> str:
    """Markdown: above 1 the rival needs more."""
    best_of = "the best of " * (len(comparison.rivals) > 1)
    lines = [
        f"{comparison.contender}: how many times as much {best_of}{listed(comparison.rivals)} "
        "needs to the target, by medians\n",
        "| | steps | seconds |",
        "|---|---:|---:|",
    ]
    for task, ratios in comparison.tasks.items():
        lines.append(f"| {task} | {ratios['steps']} | {ratios['seconds']} |")
    means = " | ".join(mean_text(comparison, measure) for measure in MEASURES)
    return "\n".join([*lines, f"| geometric mean | {means} |"])


def listed(names: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def mean_text(comparison: Comparison, measure: Measure) -> str:
    mean = comparison.mean(measure)
    if mean is None:
        return ""
    count, total = len(comparison.both_reached(measure)), len(comparison.tasks)
    return f"{mean:.2f}" + (f" over {count} of {total} tasks" if count < total else "")


def comparison_figures(comparison: Comparison) -> dict[str, Any]:
    """The same for a JSON file, where a ratio is null unless both got to the target."""
    return {
        "contender": comparison.contender,
        "rivals": comparison.rivals,
        "tasks": {
            task: {
                measure: {"rival": ratio.rival, "rival_to_ours": finite(ratio.value) or None}
                for measure, ratio in ratios.items()
            }
            for task, ratios in comparison.tasks.items()
        },
        "geometric_mean": {measure: comparison.mean(measure) for measure in MEASURES},
        "tasks_in_mean": {measure: len(comparison.both_reached(measure)) for measure in MEASURES},
    }


# --- pictures ----------------------------------------------------------------------------------


def draw_race(path: Path, race: Race) -> None:
    """Loss, and accuracy if there is one, against steps and seconds: a line per seed."""
    rows = standings(race)
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
