"""Steps and seconds that optimizers need to learn a task, every one of them tuned.

    python scripts/benchmark_training.py --tasks digits poisson
    python scripts/benchmark_training.py --optimizers AdamW K-FAC "K-FAC, auto" --seeds 0 1 2 3 4
    python scripts/benchmark_training.py --tune-only --threads 1
    python scripts/benchmark_training.py --report-only

Tuning finds the learning rate with the fewest steps to the target, with the first of the seeds:
a run per rate of the grid, from the middle outwards. None goes on for longer than the best before
it, since it could not win any more. Timed runs then repeat the best rate with all seeds, and only
they are in the tables. Optimizers without a grid have timed runs alone.

A seed decides initial weights and order of the examples, so all optimizers start alike and see the
same batches. Learning rates are constant, and there is no weight decay. A timed run ends at the
target, at the budget, or when a loss is not finite. The clock counts steps (forward, backward,
update) and nothing else: evaluations, every few steps on a fixed set, are beside it.

Targets are part of the tasks and were fixed beforehand. That of "curves" is the best loss of AdamW
within 1,500 steps, so AdamW is tuned first there, whatever is chosen, and its runs are whole.

Every run is written into the output folder when it is over, under a name that depends on all of its
settings, on versions and on the sources of kfac; that of a timed run also on the machine, the
number of threads and the budget in seconds. These do not decide the steps of a tuning run, which
has no such budget: it may run in the background, on any number of threads. An interrupted benchmark
goes on where it was; to repeat a run, delete its file. The tables show medians over the seeds, with
the lowest and the highest in brackets, and ratios over all tasks; results.json and a picture per
task are written beside the runs. Optimizers that are not installed or cannot train a task are
listed with the reason: pip install ".[peers]" has SOAP and Shampoo.
"""

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from training.contenders import CONTENDERS
from training.curves import contact_sheet
from training.data import curve_images
from training.planning import Choice, Race, environment, run_races, stored_races
from training.report import (
    comparison_figures,
    comparison_table,
    comparisons,
    draw_race,
    figures,
    table,
    tuning_table,
)
from training.results import Results
from training.tasks import TASKS


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.contact_sheet:
        contact_sheet(options.contact_sheet, curve_images().evaluation.inputs)
        return 0
    choice = Choice(
        options.tasks, options.optimizers, options.seeds, options.learning_rates,
        options.budget_seconds, options.device,
    )  # fmt: skip
    results = Results(options.output_dir / "runs")
    if options.tune_only:
        for race in run_races(choice, results, tune_only=True):
            print("\n" + tuning_table(race, TASKS[race.task].description))
        return 0
    races = stored_races(choice, results) if options.report_only else run_races(choice, results)
    report(races, choice, options.output_dir)
    return 0


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="tasks:\n" + "\n".join(f"  {n:<10}{t.description}" for n, t in TASKS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--tasks", nargs="+", choices=list(TASKS), metavar="NAME", default=list(TASKS),
        help=", ".join(TASKS))  # fmt: skip
    add("--optimizers", nargs="+", choices=list(CONTENDERS), metavar="NAME",
        default=list(CONTENDERS), help="; ".join(CONTENDERS))  # fmt: skip
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="SEED",
        help="of the timed runs; tuning has the first one")  # fmt: skip
    add("--learning-rates", nargs="+", type=float, metavar="LR",
        help="instead of the grids of the tasks and optimizers")  # fmt: skip
    add("--budget-seconds", type=float, metavar="SECONDS",
        help="training time of a timed run at most; each task has its own if left out")  # fmt: skip
    add("--output-dir", type=Path, default=Path("runs/benchmark_training"), metavar="DIR")
    only = parser.add_mutually_exclusive_group().add_argument
    only("--tune-only", action="store_true", help="find the best learning rates, time nothing")
    only("--report-only", action="store_true", help="report what the folder holds, run nothing")
    add("--device", default="cpu")
    add("--threads", type=int, help="CPU threads; torch decides if left out")
    add("--contact-sheet", type=Path, metavar="PNG", help="draw images of the task curves, and end")
    return parser


def report(races: Sequence[Race], choice: Choice, directory: Path) -> None:
    for race in races:
        print("\n" + table(race, TASKS[race.task].description))
        if race.timed:
            draw_race(directory / f"{race.task}.png", race)
    compared = comparisons(races)
    for comparison in compared:
        print("\n" + comparison_table(comparison))
    content = {
        "command": shlex.join(["python", *sys.argv]),
        "environment": environment(choice.device),
        "tasks": {race.task: figures(race) for race in races},
        "comparisons": [comparison_figures(comparison) for comparison in compared],
    }
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "results.json"
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    print(f"\nfigures and pictures: {directory}")


if __name__ == "__main__":
    sys.exit(main())
