"""What a mutation run found: results on disk, a table, and the survivors with their reasons."""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from mutation.mutants import Mutant
from mutation.running import Outcome, Status

STATUSES: tuple[Status, ...] = ("killed", "timed out", "crashed", "survived")


@dataclass(frozen=True)
class Record:
    """One mutant and what became of it."""

    module: str
    key: str
    line: int
    digest: str
    status: Status
    test: str
    seconds: float

    @property
    def survived(self) -> bool:
        return self.status == "survived"


def record_of(module: str, mutant: Mutant, outcome: Outcome) -> Record:
    return Record(module, mutant.key, mutant.line, digest(mutant), *outcome)


def digest(mutant: Mutant) -> str:
    return hashlib.sha256(mutant.source.encode()).hexdigest()[:16]


def append(path: Path, record: Record) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(asdict(record)) + "\n")


def load(path: Path) -> dict[str, Record]:
    """The last record of every mutant, by digest."""
    lines = path.read_text().splitlines() if path.exists() else []
    return {record.digest: record for record in (Record(**json.loads(line)) for line in lines)}


def share_killed(records: Sequence[Record]) -> float:
    return sum(not record.survived for record in records) / len(records)


def table(records: Sequence[Record]) -> str:
    """A row for every module and one for all."""
    modules = list(dict.fromkeys(record.module for record in records))
    rows = [row(name, [r for r in records if r.module == name]) for name in modules]
    head = ["module", "drawn", *STATUSES, "share killed"]
    lines = [head, ["-" * len(cell) for cell in head], *rows, row("all", records)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def row(name: str, records: Sequence[Record]) -> list[str]:
    counts = Counter(record.status for record in records)
    numbers = [str(counts[status]) for status in STATUSES]
    return [name, str(len(records)), *numbers, f"{share_killed(records):.1%}"]


def survivors(records: Sequence[Record], reasons: Mapping[str, str]) -> str:
    """Every survivor: where it is, what it changes, and why no test can tell."""
    return "\n\n".join(
        f"line {record.line} of {record.key}\n= {reasons.get(record.key, 'not explained')}"
        for record in records
        if record.survived
    )


def unexplained(records: Sequence[Record], reasons: Mapping[str, str]) -> list[Record]:
    return [record for record in records if record.survived and record.key not in reasons]
