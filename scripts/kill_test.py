"""Kill a training run at random moments, resume it every time, and see whether it ends the same.

    python scripts/kill_test.py                        # 20 kills, on two idle cores some minutes
    python scripts/kill_test.py --kills 5 epochs=2     # any setting of train_cifar.py

scripts/train_cifar.py trains once without interruption. Then the same command is started again and
again with --resume and ended by SIGKILL: while it starts, while it trains, while it writes a file.
After the last kill it runs to its end. Checkpoint, best weights, metrics and TensorBoard scalars
then have to be those of the uninterrupted run to the last bit, save what the clock decides.
"""

import argparse
import csv
import json
import logging
import os
import platform
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tensorboard.backend.event_processing import event_accumulator  # type: ignore[import-untyped]
from tqdm import tqdm

from cifar.settings import CifarSettings
from experiment.checkpoints import BEST, LATEST, load_checkpoint
from experiment.equality import differences
from experiment.errors import RunError
from experiment.metrics import TIMES
from experiment.settings import load_settings
from experiment.whole_files import partial_files

SCRIPT = Path(__file__).resolve().with_name("train_cifar.py")
CONFIG = SCRIPT.parent.parent / "configs" / "cifar" / "kfac.toml"
OVERRIDES = ["data.batch_size=32", "checkpoints_per_epoch=14"]
POLL = 1e-3
"""Seconds between two looks at the folder of the run."""


@dataclass(frozen=True)
class Aim:
    """When to kill: `starting`, `training` or `writing`, and after how many checkpoints.

    `fraction` says how far into the start, the interval between two checkpoints, or the file.
    """

    stage: str
    checkpoints: int
    fraction: float


@dataclass(frozen=True)
class Kill:
    """What was found after it."""

    aim: str
    seconds: float
    """Since the process was started."""
    step: int
    """Of the checkpoint that is left; 0: there is none."""
    stage: str


@dataclass(frozen=True)
class Reference:
    """The uninterrupted run."""

    directory: Path
    start_seconds: float
    seconds: float
    steps: int
    checkpoints: int

    @property
    def interval(self) -> float:
        """Seconds from one checkpoint to the next."""
        return (self.seconds - self.start_seconds) / self.checkpoints


class Process:
    """The training script at work; its output is in `log`."""

    def __init__(self, command: Sequence[str], log: Path) -> None:
        self.log, self.started = log, time.perf_counter()
        with log.open("wb") as file:
            self.popen = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.started

    @property
    def is_training(self) -> bool:
        """Or just before it: the run has described itself."""
        return "from step" in self.log.read_text()

    def wait_until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            if self.popen.poll() is not None:
                raise RunError(
                    f"The run ended before it could be killed; see {self.log}. If it came to its "
                    "end, make it longer by epochs= or kill it less often by --kills."
                )
            time.sleep(POLL)

    def finish(self) -> None:
        if self.popen.wait() != 0:
            raise RunError(f"The run failed:\n{self.log.read_text()}")


@contextmanager
def started(command: Sequence[str], log: Path) -> Iterator[Process]:
    """A process that does not outlive the block; whatever ends the block, it is a SIGKILL."""
    process = Process(command, log)
    try:
        yield process
    finally:
        process.popen.kill()
        process.popen.wait()


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_intermixed_args(arguments)
    try:
        result = kill_and_compare(options)
    except RunError as error:
        print(error, file=sys.stderr)
        return 2
    print(summary(result))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 1 if result["differences"] else 0


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "overrides",
        metavar="KEY=VALUE",
        nargs="*",
        help=f"setting of the run, after {' '.join(OVERRIDES)}",
    )
    add("--config", metavar="TOML", type=Path, default=CONFIG, help="default: %(default)s")
    add("--kills", metavar="N", type=int, default=20, help="default: %(default)s")
    add("--seed", type=int, default=0, help="of the moments; default: %(default)s")
    add("--output-dir", metavar="DIR", type=Path, default=Path("runs/kill_test"))
    add("--json", metavar="FILE", type=Path, help="also write the result there")
    return parser


def kill_and_compare(options: argparse.Namespace) -> dict[str, Any]:
    if options.kills < 1:
        raise RunError(f"--kills must be at least 1, but got {options.kills}.")
    settings = load_settings(CifarSettings, options.config, [*OVERRIDES, *options.overrides])
    checkpoints = settings.epochs * settings.checkpoints_per_epoch
    if checkpoints < 2:
        raise RunError("The run needs at least two checkpoints; set checkpoints_per_epoch.")
    options.output_dir.mkdir(parents=True, exist_ok=True)
    reference = run_whole(options, checkpoints)
    directory = options.output_dir / "killed"
    kills = kill_often(options, reference, directory)
    return {
        "kills": [asdict(kill) for kill in kills],
        "seed": options.seed,
        "steps": reference.steps,
        "checkpoints": checkpoints,
        "seconds": reference.seconds,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "settings": settings.model_dump(),
        "differences": differences(
            "run", contents(reference.directory), contents(directory), TIMES
        ),
    }


def command(options: argparse.Namespace, directory: Path, *more: str) -> list[str]:
    overrides = [*OVERRIDES, *options.overrides]
    target = ["--output-dir", str(directory), *more]
    return [sys.executable, str(SCRIPT), str(options.config), *overrides, *target]


def run_whole(options: argparse.Namespace, checkpoints: int) -> Reference:
    directory = options.output_dir / "whole"
    log = options.output_dir / "whole.log"
    print("without interruption ...", flush=True)
    with started(command(options, directory, "--overwrite"), log) as process:
        process.wait_until(lambda: process.is_training)
        start = process.seconds
        process.finish()
        seconds = process.seconds
    steps = load_checkpoint(directory / LATEST)["step"]
    print(f"without interruption: {steps} steps in {seconds:.0f} s", flush=True)
    return Reference(directory, start, seconds, steps, checkpoints)


def kill_often(options: argparse.Namespace, reference: Reference, directory: Path) -> list[Kill]:
    """Train in `directory`, anew, with kills."""
    (directory / LATEST).unlink(missing_ok=True)
    kills = []
    log = options.output_dir / "killed.log"
    aims = draw_aims(options.kills, reference.checkpoints, random.Random(options.seed))
    for number, aim in enumerate(
        tqdm(aims, unit=" kills", leave=False, disable=not sys.stderr.isatty()), start=1
    ):
        with started(command(options, directory, "--resume"), log) as process:
            wait_for(aim, process, reference, directory)
            seconds = process.seconds
        kills.append(found_after(aim, seconds, process, directory))
        tqdm.write(f"kill {number:>{len(str(len(aims)))}}: {describe(kills[-1])}")
    with started(command(options, directory, "--resume"), log) as process:
        process.finish()
    return kills


def draw_aims(kills: int, checkpoints: int, generator: random.Random) -> list[Aim]:
    """At random, in the order of the run; of more than two the first two before any checkpoint."""
    stages = generator.choices(["starting", "training", "writing"], [1, 2, 2], k=kills)
    # Not in the last tenth: a run that is faster this time must not end first.
    after = sorted(generator.randrange(max(1, checkpoints * 9 // 10)) for _ in stages)
    early = ["starting", "training"][: kills - 1]
    stages[: len(early)], after[: len(early)] = early, [0 for _ in early]
    return [
        Aim(stage, count, generator.random()) for stage, count in zip(stages, after, strict=True)
    ]


def wait_for(aim: Aim, process: Process, reference: Reference, directory: Path) -> None:
    """Return when the moment is there, by the clock at the latest with the next checkpoint."""
    counted = CheckpointCount(directory / LATEST, reference)
    first = counted.update()
    if aim.stage == "starting":
        until = process.seconds + aim.fraction * reference.start_seconds
        process.wait_until(lambda: process.seconds >= until or counted.update() > first)
        return
    process.wait_until(lambda: process.is_training)
    process.wait_until(lambda: counted.update() >= aim.checkpoints)
    if aim.stage == "training":
        first, until = counted.update(), process.seconds + aim.fraction * reference.interval
        process.wait_until(lambda: process.seconds >= until or counted.update() > first)
    else:
        process.wait_until(partial(is_writing, directory, reference.directory, aim.fraction))


class CheckpointCount:
    """How many checkpoints a run has written, by watching the name of the latest."""

    def __init__(self, latest: Path, reference: Reference) -> None:
        self.latest, self.version = latest, version(latest)
        self.count = step_of(latest) * reference.checkpoints // reference.steps

    def update(self) -> int:
        if (now := version(self.latest)) != self.version:
            self.version, self.count = now, self.count + 1
        return self.count


def version(path: Path) -> tuple[int, int] | None:
    """Changes when another file takes this name."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_ino, status.st_mtime_ns


def step_of(latest: Path) -> int:
    step: int = load_checkpoint(latest)["step"] if latest.exists() else 0
    return step


def is_writing(directory: Path, whole: Path, fraction: float) -> bool:
    """Whether a file is being written, and has `fraction` of the size that it had in `whole`."""
    for path in partial_files(directory):
        try:
            if path.stat().st_size >= fraction * (whole / target(path)).stat().st_size:
                return True
        except FileNotFoundError:  # it is whole by now
            continue
    return False


def target(path: Path) -> str:
    """The file that a partial one is to replace."""
    return path.stem.removeprefix(".")


def found_after(aim: Aim, seconds: float, process: Process, directory: Path) -> Kill:
    if left := partial_files(directory):
        stage = f"writing {target(left[0])}"
    else:
        stage = "training" if process.is_training else "starting"
    return Kill(aim.stage, seconds, step_of(directory / LATEST), stage)


def describe(kill: Kill) -> str:
    place = f"after the checkpoint of step {kill.step}" if kill.step else "before any checkpoint"
    return f"{place}, while {kill.stage}, {kill.seconds:.1f} s after its start"


def contents(directory: Path) -> dict[str, object]:
    """All that a run has written, but the picture."""
    with (directory / "metrics.csv").open(newline="", encoding="utf-8") as file:
        metrics = list(csv.DictReader(file))
    # Events behind a checkpoint are dropped when the run goes on from it, which is no news.
    logging.getLogger("tensorboard").setLevel(logging.ERROR)
    board = event_accumulator.EventAccumulator(str(directory / "tensorboard"), {"scalars": 0})
    board.Reload()
    return {
        "files": sorted(path.name for path in directory.iterdir()),
        LATEST: load_checkpoint(directory / LATEST),
        BEST: torch.load(directory / BEST, weights_only=True),
        "metrics.csv": metrics,
        "tensorboard": {
            tag: [(event.step, event.value) for event in board.Scalars(tag)]
            for tag in board.Tags()["scalars"]
        },
    }


def summary(result: dict[str, Any]) -> str:
    kills = result["kills"]
    stages = Counter(kill["stage"] for kill in kills)
    places = ", ".join(f"{count} while {stage}" for stage, count in sorted(stages.items()))
    early = sum(kill["step"] == 0 for kill in kills)
    lines = [
        f"resumed after {len(kills)} of {len(kills)} kills: {places}; "
        f"{early} of them before the first checkpoint"
    ]
    if result["differences"]:
        lines += ["The run did not end as without interruption:", *result["differences"]]
    else:
        lines += ["The run ended as without interruption, to the last bit."]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
