"""Times of every class of steps, and of the stages inside them."""

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch

from step_cost.memory import measure_memory
from step_cost.schedule import Cycle, Layers, Periods, cycle, mean_step
from step_cost.stages import PRECONDITION, REFRESH, STATISTICS, Clock, stage_timers
from step_cost.trainers import Contest
from step_cost.workloads import Workload

Samples = dict[str, list[float]]
Refreshes = dict[Layers, list[float]]
REFRESHES_BY_LAYER = 3


class Measurement:
    """All figures of one workload."""

    def __init__(self, workload: Workload, options: argparse.Namespace) -> None:
        self.workload = workload
        self.options = options
        self.contest = Contest(workload, options)
        self.device = self.contest.batch[0].device
        engine = self.contest.kfac.engine
        self.cycles: dict[Periods, Cycle] = {
            periods: cycle(engine.blocks, periods, staggered=engine.stagger_refreshes)
            for periods in options.periods
        }

    def run(self) -> dict[str, Any]:
        self.warm_up()
        samples, refreshes, timed = self.time_steps()
        stages = {
            name: self.typical_row([clock.by_stage() for clock in clocks])
            for name, clocks in timed.items()
        }
        layers = self.layer_costs(timed)
        periods = []
        for pair in self.cycles:
            row = self.mean_over(pair, samples, refreshes[pair])
            row["stages"] = mean_stages(row["classes"], stages)
            row["layers"] = mean_layers(row["classes"], layers, self.cycles[pair])
            periods.append(row)
        turns = [turn for pair in self.cycles.values() for turn in pair.turns]
        return {
            "description": self.workload.description,
            "parameters": sum(p.numel() for p in self.contest.kfac.model.parameters()),
            "milliseconds": {name: self.typical(times) for name, times in samples.items()},
            "samples": samples,
            "periods": periods,
            "stages": stages,
            "memory": measure_memory(self.contest, max(turns, key=self.inversion_cost)),
        }

    def typical(self, times: Sequence[float]) -> float:
        return min(times) if self.options.fastest else statistics.median(times)

    def typical_row(self, rows: Sequence[Mapping[Any, float]]) -> dict[Any, float]:
        """Stages of the fastest step, or the median of every stage."""
        if self.options.fastest:
            totals = [sum(row.values()) for row in rows]
            return dict(rows[totals.index(min(totals))])
        return {key: statistics.median(row.get(key, 0.0) for row in rows) for key in rows[0]}

    def warm_up(self) -> None:
        steps = self.contest.classes()
        steps["factor"]()  # gives every layer its first inverse
        for _ in range(self.options.warm_up):
            for step in steps.values():
                step()

    # --- totals --------------------------------------------------------------------------------

    def time_steps(self) -> tuple[Samples, dict[Periods, Refreshes], dict[str, list[Clock]]]:
        """Run all classes in turn, without stage timers and with them, and all refreshes.

        Every round starts with another class.
        """
        steps = self.contest.classes()
        samples: Samples = {name: [] for name in steps}
        refreshes: dict[Periods, Refreshes] = {
            pair: {turn: [] for turn in cycle.turns} for pair, cycle in self.cycles.items()
        }
        clocks: dict[str, list[Clock]] = {name: [] for name in steps}
        names = list(steps)
        for repeat in range(self.options.steps):
            shift = repeat % len(names)
            for name in names[shift:] + names[:shift]:
                samples[name].append(self.milliseconds(steps[name]))
                clocks[name].append(Clock(self.synchronize))
                with stage_timers(clocks[name][-1]):
                    steps[name]()
            for times in refreshes.values():
                steps["factor"]()  # inverses are made from new factors only
                for turn, measured in times.items():
                    measured.append(self.milliseconds(lambda: self.contest.kfac.refresh(turn)))  # noqa: B023
        return samples, refreshes, clocks

    def milliseconds(self, function: Callable[[], None]) -> float:
        self.synchronize()
        start = time.perf_counter()
        function()
        self.synchronize()
        return 1e3 * (time.perf_counter() - start)

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def mean_over(
        self,
        pair: Periods,
        samples: Samples,
        refreshes: Mapping[Layers, Sequence[float]],
    ) -> dict[str, Any]:
        """The mean step over a cycle of the schedule, composed from its classes."""
        steps = self.cycles[pair]
        middle = {name: self.typical(times) for name, times in samples.items()}
        turns = {turn: self.typical(times) for turn, times in refreshes.items()}
        ordinary, factor = middle["ordinary"], middle["factor"]
        parts = steps.parts(ordinary, factor, turns)
        mean = mean_step(parts)
        rounds = [
            mean_step(steps.parts(o, f, {turn: times[i] for turn, times in refreshes.items()}))
            for i, (o, f) in enumerate(zip(samples["ordinary"], samples["factor"], strict=True))
        ]
        return {
            "periods": str(pair),
            "classes": [part._asdict() for part in parts],
            "mean": mean,
            "longest": steps.longest(ordinary, factor, turns),
            "over": {name: mean / middle[name] for name in self.contest.baselines},
            "over_by_round": {
                name: [m / b for m, b in zip(rounds, samples[name], strict=True)]
                for name in self.contest.baselines
            },
        }

    # --- stages --------------------------------------------------------------------------------

    def layer_costs(self, timed: Mapping[str, Sequence[Clock]]) -> dict[str, dict[str, float]]:
        """Milliseconds of statistics, refresh and preconditioning, by layer and stage.

        Layers of one shape are preconditioned together and cost the same.
        """
        engine = self.contest.kfac.engine
        clocks: dict[Hashable, Any] = {
            name: self.typical_row([clock.seconds for clock in timed[name]])
            for name in ("ordinary", "factor")
        }
        shapes = {
            name: (la.shape.groups, la.shape.d_out, la.shape.d_in)
            for name, la in engine.blocks.layers.items()
        }
        sharing = list(shapes.values())
        costs: dict[str, dict[str, float]] = {}
        for layer, shape in shapes.items():
            costs[layer] = {
                stage: 1e3 * clocks["factor"].get((stage, layer), 0.0)
                for stage in STATISTICS.values()
            }
            together = clocks["ordinary"].get((PRECONDITION, shape), 0.0)
            costs[layer][PRECONDITION] = 1e3 * together / sharing.count(shape)
        refreshes: dict[str, list[float]] = defaultdict(list)
        for _ in range(min(self.options.steps, REFRESHES_BY_LAYER)):
            self.contest.classes()["factor"]()
            for layer in shapes:
                alone = frozenset([layer])
                refreshes[layer].append(
                    self.milliseconds(lambda: self.contest.kfac.refresh(alone))  # noqa: B023
                )
        for layer, times in refreshes.items():
            costs[layer][REFRESH] = self.typical(times)
        return costs

    def inversion_cost(self, turn: Layers) -> int:
        layers = self.contest.kfac.engine.blocks.layers
        return sum(
            shape[0] * shape[-1] ** 3
            for name in turn
            for shape in layers[name].shape.factor_shapes().values()
        )


def mean_stages(
    classes: Sequence[Mapping[str, Any]], stages: Mapping[str, Mapping[str, float]]
) -> dict[str, float]:
    """Milliseconds per step of every stage, over a cycle of the schedule."""
    frequency = {part["name"]: part["frequency"] for part in classes}
    mean = {
        stage: sum(frequency[name] * stages[name][stage] for name in ("ordinary", "factor"))
        for stage in stages["factor"]
    }
    mean[REFRESH] += sum(
        part["frequency"] * part["milliseconds"] for part in classes if part["name"] == "refresh"
    )
    return mean


def mean_layers(
    classes: Sequence[Mapping[str, Any]],
    layers: Mapping[str, Mapping[str, float]],
    steps: Cycle,
) -> dict[str, dict[str, float]]:
    """Milliseconds per step of what K-FAC does for each layer, over a cycle of the schedule."""
    updates = next(part["frequency"] for part in classes if part["name"] == "factor")
    result = {}
    for layer, costs in layers.items():
        refreshed = sum(layer in names for _, names in steps.steps) / len(steps.steps)
        often = {PRECONDITION: 1.0, REFRESH: refreshed}
        result[layer] = {stage: ms * often.get(stage, updates) for stage, ms in costs.items()}
    return result
