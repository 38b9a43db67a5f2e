"""What is kept of a run, and the folder that keeps it."""

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

Purpose = Literal["tuning", "timed"]
BEHIND = "behind"  # the outcome of a run that can no longer be the best


@dataclass(frozen=True)
class Evaluation:
    """How far a run has come: training seconds are without those of evaluations."""

    step: int
    seconds: float
    loss: float
    accuracy: float | None = None

    def value(self, metric: str) -> float:
        result: float = getattr(self, metric)
        return result


@dataclass(frozen=True)
class Record:
    """A run that is over: all that decides it, what was measured, and how it ended."""

    configuration: Mapping[str, Any]
    evaluations: tuple[Evaluation, ...]
    outcome: str
    steps: int
    seconds: float

    @property
    def learning_rate(self) -> float | None:
        rate: float | None = self.configuration["learning_rate"]
        return rate

    @property
    def seed(self) -> int:
        return int(self.configuration["seed"])

    @property
    def seconds_per_step(self) -> float:
        return self.seconds / max(self.steps, 1)


class Results:
    """A folder with one file per run, named after its configuration."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def find(self, configuration: Mapping[str, Any]) -> Record | None:
        path = self.path(configuration)
        return read(path) if path.exists() else None

    def add(self, record: Record) -> None:
        """Write beside the file, then rename: an interrupted benchmark leaves whole files only."""
        self.directory.mkdir(parents=True, exist_ok=True)
        path = self.path(record.configuration)
        temporary = path.with_name(f".{path.name}.partial")
        temporary.write_text(json.dumps(asdict(record), ensure_ascii=False) + "\n")
        os.replace(temporary, path)

    def __iter__(self) -> Iterator[Record]:
        """All records, the oldest first."""
        paths = self.directory.glob("*.json")
        return map(read, sorted(paths, key=lambda path: path.stat().st_mtime_ns))

    def path(self, configuration: Mapping[str, Any]) -> Path:
        text = json.dumps(configuration, sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()[:12]
        rate = configuration["learning_rate"]
        parts = (
            configuration["task"],
            re.sub(r"\W+", "-", configuration["optimizer"]).lower(),
            "default" if rate is None else f"lr{rate:g}",
            configuration["purpose"],
            f"seed{configuration['seed']}",
            digest,
        )
        return self.directory / ("_".join(parts) + ".json")


def read(path: Path) -> Record:
    content = json.loads(path.read_text())
    content["evaluations"] = tuple(Evaluation(**row) for row in content["evaluations"])
    return Record(**content)
