"""Which runs there are: a tuning run per learning rate, then every seed with the best of them."""

import hashlib
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
from training.results import Record, Results
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

    def rates(self, task: Task, name: str) -> Sequence[float | None]:
        """What a contender is tuned over; its default alone if it is not to be tuned."""
        if not CONTENDERS[name].learning_rates:
            return (None,)
        return self.learning_rates or own_rates(task, name)


@dataclass
class Race:
    """The records of one task by contender, and why other contenders have none."""

    task: str
    target: Target
    records: dict[str, list[Record]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)


def own_rates(task: Task, name: str) -> tuple[float, ...]:
    return task.learning_rates.get(name, CONTENDERS[name].learning_rates)


def run_races(choice: Choice, results: Results) -> list[Race]:
    """Carry out all runs that are not in the folder yet."""
    races = []
    for name in choice.tasks:
        runner = Runner(name, TASKS[name], choice, results)
        race = Race(name, runner.target())
        races.append(race)
        for contender in choice.contenders:
            reason = CONTENDERS[contender].reason_to_skip(TASKS[name].model())
            if reason:
                race.skipped[contender] = reason
            else:
                race.records[contender] = runner.tune_and_repeat(contender, race.target)
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
        rates = own_rates(self.task, target.contender)
        seed = self.choice.seeds[0]
        return target.resolve(self.record(target.contender, lr, seed, None) for lr in rates)

    def tune_and_repeat(self, contender: str, target: Target) -> list[Record]:
        first, *others = self.choice.seeds
        yardstick = self.task.target
        whole = isinstance(yardstick, BestOf) and yardstick.contender == contender
        stop = None if whole else target
        tuning = [
            self.record(contender, lr, first, stop)
            for lr in self.choice.rates(self.task, contender)
        ]
        rate = best_rate(tuning, target)
        return tuning + [self.record(contender, rate, seed, target) for seed in others]

    def record(
        self, contender: str, rate: float | None, seed: int, stop: Target | None
    ) -> Record:  # fmt: skip
        configuration = self.configuration(contender, rate, seed, stop)
        known = self.results.find(configuration)
        if known is not None:
            return known
        title = f"{self.name}: {contender}{'' if rate is None else f', lr {rate:g}'}, seed {seed}"
        with RunProgress(title, self.task.max_steps) as progress:
            run = Run(self.task, contender, rate, seed, torch.device(self.choice.device))
            record = carry_out(
                run, self.task, configuration, stop, self.max_seconds(), progress.advanced
            )
            self.results.add(record)
            progress.finished(record)
        return record

    def configuration(
        self, contender: str, rate: float | None, seed: int, stop: Target | None
    ) -> Mapping[str, Any]:
        """All that decides a run, and so whether it has been carried out already."""
        task = self.task
        return {
            "task": self.name,
            "description": task.description,
            "batch_size": task.batch_size,
            "max_steps": task.max_steps,
            "max_seconds": self.max_seconds(),
            "evaluate_every": task.evaluate_every,
            "optimizer": contender,
            "settings": CONTENDERS[contender].settings,
            "package": version(CONTENDERS[contender]),
            "learning_rate": rate,
            "seed": seed,
            "stop": asdict(stop) if stop else None,
            **environment(self.choice.device),
        }

    def max_seconds(self) -> float:
        chosen = self.choice.budget_seconds
        return self.task.max_seconds if chosen is None else chosen


def environment(device: str) -> dict[str, Any]:
    """Versions and machine."""
    on_cuda = torch.device(device).type == "cuda"
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
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
    """The learning rate with the fewest steps to the target; if none gets there, the best value."""
    return min(tuning, key=rank(target)).learning_rate


def rank(target: Target) -> Callable[[Record], tuple[float, float]]:
    """Orders records from the best to the worst."""
    sign = -1 if target.metric == "accuracy" else 1

    def key(record: Record) -> tuple[float, float]:
        first = target.first(record)
        values = (evaluation.value(target.metric) for evaluation in record.evaluations)
        return first.step if first else float("inf"), sign * best(target.metric, values)

    return key


def stored_races(choice: Choice, results: Results) -> list[Race]:
    """What the folder holds of what was chosen; of runs that differ in versions, the latest."""
    latest = {
        (c["task"], c["optimizer"], record.learning_rate, record.seed): record
        for record in results
        if (c := record.configuration)["task"] in choice.tasks and record.seed in choice.seeds
    }
    races = []
    for name in choice.tasks:
        records: dict[str, list[Record]] = {}
        for (task, contender, _, _), record in latest.items():
            if task == name:
                records.setdefault(contender, []).append(record)
        target = stored_target(TASKS[name], records)
        if target is not None:
            kept = {c: records[c] for c in choice.contenders if c in records}
            races.append(Race(name, target, kept))
    return races


def stored_target(task: Task, records: Mapping[str, Sequence[Record]]) -> Target | None:
    if isinstance(task.target, Target):
        return task.target if records else None
    unstopped = [
        record
        for record in records.get(task.target.contender, ())
        if record.configuration["stop"] is None
    ]
    return task.target.resolve(unstopped) if unstopped else None
