"""A bar for the run that is under way, on a terminal, and a line for every run that is over."""

import sys
from types import TracebackType
from typing import Self

from tqdm import tqdm

from training.results import Evaluation, Record


class RunProgress:
    """Counts steps; goes away with the run."""

    def __init__(self, title: str, steps: int) -> None:
        self.title = title
        self.bar = tqdm(
            desc=title, total=steps, unit=" steps", leave=False, disable=not sys.stderr.isatty()
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.bar.close()

    def advanced(self, evaluation: Evaluation | None) -> None:
        self.bar.update()
        if evaluation is not None:
            self.bar.set_postfix_str(numbers(evaluation))

    def finished(self, record: Record) -> None:
        self.bar.close()
        last = numbers(record.evaluations[-1])
        took = f"{record.steps} steps in {record.seconds:.1f} s"
        print(f"{self.title}: {record.outcome}, {took}, {last}", file=sys.stderr, flush=True)


def numbers(evaluation: Evaluation) -> str:
    text = f"loss {evaluation.loss:.4g}"
    return text if evaluation.accuracy is None else f"{text}, accuracy {evaluation.accuracy:.1%}"
