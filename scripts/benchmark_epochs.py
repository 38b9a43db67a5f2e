"""Epochs that K-FAC and SGD need to a test accuracy, SGD with each learning rate of a grid.

    python scripts/benchmark_epochs.py
    python scripts/benchmark_epochs.py --seeds 0 1 2 3 4 --target 0.98
    python scripts/benchmark_epochs.py --only kfac optimizer.damping=0.03

Every run ends once it gets there; accuracy is taken evaluations_per_epoch times. A run is kept in
the output folder and not repeated unless its settings change, so an interrupted benchmark goes on
where it was. Writes results.json beside the runs.
"""

import argparse
import json
import math
import platform
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch

from cifar.run import Run
from cifar.settings import CifarSettings
from cifar.training import train
from experiment.errors import RunError
from experiment.metrics import first_reaching
from experiment.processes import join_processes
from experiment.settings import load_settings

CONFIGS = Path(__file__).resolve().parent.parent / "configs" / "cifar"
GRID = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)


@dataclass(frozen=True)
class Candidate:
    """One row of the table: a config with overrides, run with every seed."""

    name: str
    config: Path
    overrides: tuple[str, ...]


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_intermixed_args(arguments)
    try:
        epochs = {
            candidate.name: [epochs_needed(candidate, seed, options) for seed in options.seeds]
            for candidate in candidates(options)
        }
    except RunError as error:
        print(error, file=sys.stderr)
        return 2
    print(table(epochs, options.seeds, options.target))
    write_results(options.output_dir / "results.json", epochs, options)
    return 0


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("overrides", metavar="KEY=VALUE", nargs="*", help="setting for all runs")
    add("--kfac", metavar="CONFIG", type=Path, default=CONFIGS / "kfac.toml")
    add("--sgd", metavar="CONFIG", type=Path, default=CONFIGS / "sgd.toml")
    add("--only", choices=("kfac", "sgd"), help="run one of the two")
    add("--grid", metavar="LR", type=float, nargs="+", default=GRID, help="SGD's learning rates")
    add("--seeds", metavar="SEED", type=int, nargs="+", default=(0, 1, 2))
    add("--target", metavar="ACCURACY", type=float, default=0.97)
    add("--output-dir", metavar="DIR", type=Path, default=Path("runs/benchmark_epochs"))
    return parser


def candidates(options: argparse.Namespace) -> Iterator[Candidate]:
    if options.only != "sgd":
        yield Candidate("K-FAC", options.kfac, tuple(options.overrides))
    if options.only != "kfac":
        for lr in options.grid:
            overrides = (*options.overrides, f"optimizer.lr={lr}")
            yield Candidate(f"SGD, lr {lr:g}", options.sgd, overrides)


def epochs_needed(candidate: Candidate, seed: int, options: argparse.Namespace) -> float:
    """Epochs to the target, infinite if the run ends before."""
    stop = (f"seed={seed}", f"stop_at_accuracy={options.target}", "checkpoints_per_epoch=0")
    settings = load_settings(CifarSettings, candidate.config, (*candidate.overrides, *stop))
    name = f"{candidate.name}, seed {seed}"
    directory = options.output_dir / name.replace(", ", "_").replace(" ", "")
    finished = directory / "finished.json"
    wanted = settings.model_dump()
    if finished.exists():
        result = json.loads(finished.read_text())
        if result["settings"] == wanted:
            return result["epochs"] or math.inf
    with join_processes(settings.device) as processes:
        row = first_reaching(train(Run(settings, processes, directory, name)), options.target)
    epochs = row.epoch if row else None
    finished.write_text(json.dumps({"epochs": epochs, "settings": wanted}))
    return epochs or math.inf


def table(epochs: Mapping[str, Sequence[float]], seeds: Sequence[int], target: float) -> str:
    lines = [f"\nepochs to {target:.0%} test accuracy"]
    lines.append(f"{'':<16}" + "".join(f"{f'seed {seed}':>10}" for seed in seeds) + "    median")
    for name, needed in epochs.items():
        cells = "".join(f"{value:>10.2f}" for value in (*needed, median(needed)))
        lines.append(f"{name:<16}{cells}")
    return "\n".join([*lines, *verdict(epochs)])


def verdict(epochs: Mapping[str, Sequence[float]]) -> list[str]:
    medians = {name: median(needed) for name, needed in epochs.items() if name != "K-FAC"}
    if "K-FAC" not in epochs or not medians:
        return []
    best = min(medians, key=lambda name: medians[name])
    ratio = median(epochs["K-FAC"]) / medians[best]
    return [f"K-FAC needs {ratio:.2f} of the epochs of {best}, the best of the grid."]


def write_results(
    path: Path, epochs: Mapping[str, Sequence[float]], options: argparse.Namespace
) -> None:
    results = {
        "target": options.target,
        "seeds": list(options.seeds),
        "overrides": options.overrides,
        "epochs": {name: [finite(value) for value in row] for name, row in epochs.items()},
        "medians": {name: finite(median(row)) for name, row in epochs.items()},
        "torch": torch.__version__,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
    }
    path.write_text(json.dumps(results, indent=2) + "\n")


def finite(value: float) -> float | None:
    """JSON has no infinity."""
    return value if math.isfinite(value) else None


if __name__ == "__main__":
    sys.exit(main())
