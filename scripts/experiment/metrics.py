"""Numbers of a run: sums over batches, rows over time, where they are written."""

import csv
import io
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from experiment.processes import Processes
from experiment.whole_files import replacing


class Means(NamedTuple):
    loss: float
    accuracy: float


class Tally:
    """Sums of loss, correct answers and images, kept on the device so that no step waits for it."""

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(3, device=device)

    def add(self, mean_loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        correct = (logits.detach().argmax(1) == labels).sum()
        self.sums[0] += mean_loss.detach().float() * len(labels)
        self.sums[1] += correct
        self.sums[2] += len(labels)

    def means(self, processes: Processes | None = None) -> Means:
        """Over the images of this process, or of all `processes`; waits for the device."""
        sums = processes.total(self.sums) if processes else self.sums
        loss, correct, count = sums.tolist()
        return Means(loss / max(count, 1), correct / max(count, 1))


@dataclass(frozen=True)
class Row:
    """One evaluation; `train_*` and `images_per_second` cover the steps since the one before."""

    step: int
    epoch: float
    seconds: float
    """Training time so far, without evaluations and checkpoints."""
    lr: float
    train_loss: float
    train_accuracy: float
    test_loss: float
    test_accuracy: float
    images_per_second: float


COLUMNS = [field.name for field in fields(Row)]
TIMES = {"seconds", "images_per_second"}
"""Columns in which equal runs differ."""


def best_accuracy(rows: Sequence[Row]) -> float:
    return max((row.test_accuracy for row in rows), default=-1.0)


def first_reaching(rows: Sequence[Row], accuracy: float) -> Row | None:
    return next((row for row in rows if row.test_accuracy >= accuracy), None)


class MetricsLog:
    """`metrics.csv` and TensorBoard files in a run's folder, starting from the rows so far."""

    def __init__(self, directory: Path, rows: Sequence[Row]) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        if not rows:
            shutil.rmtree(directory / "tensorboard", ignore_errors=True)
        purge_step = rows[-1].step + 1 if rows else None
        self.board = SummaryWriter(directory / "tensorboard", purge_step=purge_step)
        table = io.StringIO(newline="")
        csv.writer(table).writerows([COLUMNS, *map(astuple, rows)])
        with replacing(directory / "metrics.csv") as whole:
            whole.write(table.getvalue().encode())
        self.file = (directory / "metrics.csv").open("a", newline="", encoding="utf-8")
        self.writer = csv.writer(self.file)

    def append(self, row: Row, diagnostics: Mapping[str, object]) -> None:
        self.writer.writerow(astuple(row))
        self.file.flush()
        for name in COLUMNS[1:]:
            self.board.add_scalar(name, getattr(row, name), row.step)
        for name, value in diagnostics.items():
            if isinstance(value, int | float):
                self.board.add_scalar(f"optimizer/{name}", value, row.step)
        self.board.flush()

    def close(self) -> None:
        self.file.close()
        self.board.close()


def write_table(path: Path, runs: Mapping[str, Sequence[Row]]) -> None:
    """The rows of several runs in one CSV file, the name of the run in front."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["run", *COLUMNS])
        for name, rows in runs.items():
            writer.writerows([name, *astuple(row)] for row in rows)
