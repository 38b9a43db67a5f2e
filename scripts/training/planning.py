"""Which runs there are: a tuning run per learning rate, then timed ones at the best of them."""

import hashlib
import math
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch

import kfac
from training.contenders import CONTENDERS, Contender
from training.progress import RunProgress
from training.results import BEHIND, Purpose, Record, Results
from training.running import Run, carry_out
from training.targets import BestOf, Target, best
from training.tasks import TASKS, Task


@dataclass(frozen=True)
class Choice:
    """What the command line chose; None is what the tasks and contenders say."""

    tasks: Sequence[str]
    contenders: Sequence[str]
    seeds: Sequence[int]
    learning_rates: Sequence[float] | None = None
    budget_seconds: float | None = None
    device: str = "cpu"

    def rates(self, task: Task, name: str) -> list[float]:
        """What a contender is tuned over, in that order; nothing if it runs at its default."""
        own = own_rates(task, name)
        return outwards(self.learning_rates or own) if own else []


@dataclass
class Race:
    """The records of one task by contender, and why other contenders have none."""

    task: str
    target: Target
    tuning: dict[str, list[Record]] = field(default_factory=dict)
    timed: dict[str, list[Record]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)


def own_rates(task: Task, name: str) -> tuple[float, ...]:
    return task.learning_rates.get(name, CONTENDERS[name].learning_rates)


def outwards(rates: Iterable[float]) -> list[float]:
    """The middle one first, then its neighbours on either side in turn."""
    grid = sorted(set(rates))
    middle = (len(grid) - 1) / 2
    return [grid[n] for n in sorted(range(len(grid)), key=lambda n: abs(n - middle))]


def run_races(choice: Choice, results: Results, tune_only: bool = False) -> list[Race]:
    """Carry out all runs that are not in the folder yet; the timed ones unless `tune_only`."""
    races = []
    for name in choice.tasks:
        runner = Runner(name, TASKS[name], choice, results)
        race = Race(name, runner.target())
        races.append(race)
        for contender in choice.contenders:
            reason = CONTENDERS[contender].reason_to_skip(TASKS[name].model())
            if reason:
                race.skipped[contender] = reason
                continue
            race.tuning[contender] = tuning = runner.tune(contender, race.target)
            if not tune_only:
                rate = best_rate(tuning, race.target)
                race.timed[contender] = runner.time(contender, rate, race.target)
    return races


@dataclass(frozen=True)
class Runner:
    """The runs of one task, from the folder where they are kept, or else carried out."""

    name: str
    task: Task
    choice: Choice
    results: Results

    def target(self) -> Target:
        """The task's own, or what its yardstick gets to when nothing stops it."""
        target = self.task.target
        if isinstance(target, Target):
            return target
        rates = outwards(own_rates(self.task, target.contender))
        return target.resolve(self.tuning_run(target.contender, rate, None) for rate in rates)

    def tune(self, contender: str, target: Target) -> list[Record]:
        """One run per learning rate, and none longer than the best so far; a yardstick's whole."""
        yardstick = self.task.target
        whole = isinstance(yardstick, BestOf) and yardstick.contender == contender
        stop = None if whole else target
        records: list[Record] = []
        for rate in self.choice.rates(self.task, contender):
            limit = fewest_steps(records, stop) if stop else None
            records.append(self.tuning_run(contender, rate, stop, limit))
        return records

    def time(self, contender: str, rate: float | None, target: Target) -> list[Record]:
        """A run per seed."""
        return [self.timed_run(contender, rate, seed, target) for seed in self.choice.seeds]

    def tuning_run(
        self, contender: str, rate: float, stop: Target | None, limit: int | None = None
    ) -> Record:
        seed = self.choice.seeds[0]
        configuration = self.configuration("tuning", contender, rate, seed, stop)
        title = f"{self.name}: {contender}, lr {rate:g}, tuning"
        return self.record(title, configuration, stop, math.inf, limit)

    def timed_run(self, contender: str, rate: float | None, seed: int, target: Target) -> Record:
        max_seconds = self.max_seconds()
        configuration = {
            **self.configuration("timed", contender, rate, seed, target),
            "max_seconds": max_seconds,
            **machine(self.choice.device),
        }
        title = f"{self.name}: {contender}{'' if rate is None else f', lr {rate:g}'}, seed {seed}"
        return self.record(title, configuration, target, max_seconds, None)

    def record(
        self,
        title: str,
        configuration: Mapping[str, Any],
        stop: Target | None,
        max_seconds: float,
        limit: int | None,
    ) -> Record:
        """What the folder has of a run, unless that was given up before the limit."""
        most = limit or self.task.max_steps
        known = self.results.find(configuration)
        if known is not None and (known.outcome != BEHIND or known.steps >= most):
            return known
        name, rate = configuration["optimizer"], configuration["learning_rate"]
        with RunProgress(title, most) as progress:
            device = torch.device(self.choice.device)
            run = Run(self.task, name, rate, configuration["seed"], device)
            record = carry_out(
                run, self.task, configuration, stop, max_seconds, limit, progress.advanced
            )
            self.results.add(record)
            progress.finished(record)
        return record

    def configuration(
        self, purpose: Purpose, contender: str, rate: float | None, seed: int, stop: Target | None
    ) -> dict[str, Any]:
        """All that decides the steps of a run: the same is not carried out again."""
        task = self.task
        return {
            "purpose": purpose,
            "task": self.name,
            "description": task.description,
            "batch_size": task.batch_size,
            "max_steps": task.max_steps,
            "evaluate_every": task.evaluate_every,
            "optimizer": contender,
            "settings": CONTENDERS[contender].settings,
            "package": version(CONTENDERS[contender]),
            "learning_rate": rate,
            "seed": seed,
            "stop": asdict(stop) if stop else None,
            **versions(),
        }

    def max_seconds(self) -> float:
        chosen = self.choice.budget_seconds
        return self.task.max_seconds if chosen is None else chosen


def environment(device: str) -> dict[str, Any]:
    return {**versions(), **machine(device)}


def versions() -> dict[str, str]:
    return {"torch": torch.__version__, "python": platform.python_version()}


def machine(device: str) -> dict[str, Any]:
    """What decides seconds."""
    on_cuda = torch.device(device).type == "cuda"
    return {
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if on_cuda else platform.machine(),
    }


def version(contender: Contender) -> str:
    """Name and version; with a digest of the sources for ours, which change between releases."""
    text = contender.package.version()
    return f"{text} ({own_digest()})" if contender.package.module == "kfac" else text


@cache
def own_digest() -> str:
    assert kfac.__file__ is not None
    sources = sorted(Path(kfac.__file__).parent.rglob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:8]


def best_rate(tuning: Iterable[Record], target: Target) -> float | None:
    """The learning rate with the fewest steps to the target; if none gets there, the best value.

    The first of equals; None, which is the default rate, if there was no tuning.
    """
    winner = min(tuning, key=rank(target), default=None)
    return winner.learning_rate if winner else None


def rank(target: Target) -> Callable[[Record], tuple[float, float]]:
    """Orders records from the best to the worst."""
    sign = -1 if target.metric == "accuracy" else 1

    def key(record: Record) -> tuple[float, float]:
        if first := target.first(record):
            return first.step, 0.0
        values = (evaluation.value(target.metric) for evaluation in record.evaluations)
        return math.inf, sign * best(target.metric, values)

    return key


def fewest_steps(records: Iterable[Record], target: Target) -> int | None:
    """To the target; None if no record gets there."""
    firsts = filter(None, map(target.first, records))
    return min((first.step for first in firsts), default=None)


def stored_races(choice: Choice, results: Results) -> list[Race]:
    """What the folder holds of what was chosen; of runs that differ in versions, the latest."""
    latest = {place(record): record for record in results}

    def held(
        purpose: Purpose, task: str, contender: str, rates: Iterable[float | None]
    ) -> list[Record]:
        seeds = choice.seeds if purpose == "timed" else choice.seeds[:1]
        keys = ((purpose, task, contender, rate, seed) for rate in rates for seed in seeds)
        return [latest[key] for key in keys if key in latest]

    races = []
    for name in choice.tasks:
        task = TASKS[name]
        target = task.target
        if isinstance(target, BestOf):
            rates = own_rates(task, target.contender)
            yardsticks = held("tuning", name, target.contender, rates)
            if not yardsticks:
                continue
            target = target.resolve(yardsticks)
        race = Race(name, target)
        for contender in choice.contenders:
            tuning = held("tuning", name, contender, choice.rates(task, contender))
            timed = held("timed", name, contender, [best_rate(tuning, target)])
            if timed:
                race.tuning[contender], race.timed[contender] = tuning, timed
        if race.timed:
            races.append(race)
    return races


def place(record: Record) -> tuple[Any, ...]:
    """What a record is for, whatever the versions and the machine."""
    names = ("purpose", "task", "optimizer", "learning_rate", "seed")
    return tuple(record.configuration.get(name) for name in names)
